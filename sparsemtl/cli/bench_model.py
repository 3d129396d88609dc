"""`sparsemtl bench model`: a finished model in our engine and in other runtimes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from sparsemtl.cli.bench_options import BenchOptions, check_positive
from sparsemtl.cli.bench_peers import ENGINE_FILE, engine_peer, executed_macs
from sparsemtl.cli.bench_tables import Lines, begin
from sparsemtl.cli.run_folder import RunFolder, load_model
from sparsemtl.engine.engine import Engine
from sparsemtl.engine.target import make_target
from sparsemtl.errors import unknown_choice
from sparsemtl.measure import bench_model
from sparsemtl.measure.bench_conv import steady_memory
from sparsemtl.measure.bench_model import Candidate
from sparsemtl.measure.flops import count_flops
from sparsemtl.measure.peers import PEERS, file_bytes
from sparsemtl.measure.pruned import SPLIT_NAME, build, parse_prune, parse_tasks, prune
from sparsemtl.sparsity.structure import parse_structure

COLUMNS = {
    "batch": ("batch", 5, "d"),
    "candidate": ("candidate", 20, "s"),
    "median_ms": ("median ms", 10, ".4g"),
    "p95_ms": ("p95 ms", 9, ".4g"),
    "spread": ("spread", 7, ".1%"),
    "images_per_second": ("images/s", 9, ".4g"),
    "rel_err": ("rel err", 9, ".1e"),
    "peak_mb": ("peak MB", 8, ".0f"),
    "load_s": ("load s", 7, ".2f"),
    "file_mb": ("file MB", 8, ".1f"),
}
CHILD_LIMIT = 300  # seconds for one process that measures memory


@dataclass(kw_only=True)
class BenchModel(BenchOptions):
    """A whole model: our engine and other runtimes in turns, with memory, load time and bytes."""

    target: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="ENGINE|RUN")] = None
    """A run folder, or an engine folder (which only itself can run); else --model."""
    model: str = "deeplab-resnet34"
    """A network of the registry, freshly initialised: deeplab-resnet18, -34, mobilenetv2."""
    tasks: str = "segmentation:40,normals:3,depth:1"
    """Its heads: names with their channels."""
    prune: str = SPLIT_NAME
    """Magnitude pruning of --model: a fraction of zeros, adapmtl-split, or component=fraction."""
    head_structure: str = "element"
    """What --prune takes from heads: element, or whole block(64,64) for GPUs."""
    device: str = "cpu"
    """cpu or cuda; float32 there is exact, without tf32, for everybody."""
    precision: str = "float32"
    """What the engine computes in on a CUDA device: float32, bf16 or fp16."""
    input: str = "1,3,321,321"
    """Shape of the input, B,C,H,W."""
    batch: tuple[int, ...] = ()
    """Batch sizes, in place of the input's own."""
    against: str = ",".join(PEERS)
    """Runtimes to compare with; those that are not installed are skipped with the reason."""
    rounds: int = 20
    """Interleaved rounds."""
    seconds: float = 30.0
    """Time of one batch size, after which no further round begins; 3 rounds are always done."""
    memory: bool = True
    """Measure memory and load time, each in a process of its own."""

    def run(self) -> int:
        shape = parse_shape("--input", self.input)
        target = make_target("bench model", self.device, self.precision)
        device = torch.device("cpu") if target is None else target.device
        names = [name.strip() for name in self.against.split(",") if name.strip()]
        for name in names:
            if name not in PEERS:
                raise ValueError(unknown_choice("a runtime of --against", name, PEERS))
        for value in (*self.batch, self.rounds):
            check_positive("--batch and --rounds", value)
        if not self.seconds > 0.0:
            raise ValueError(f"Expected --seconds > 0, got {self.seconds:g}")
        self.prepare()
        model, case = self._model()
        steady_memory()
        begin(None)
        lines, rows = Lines(COLUMNS), []
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        for batch in self.batch or (shape[0],):
            x = torch.randn(batch, *shape[1:], generator=torch.Generator().manual_seed(0))
            x = x.to(device)
            for row in self._rows(model, case, names, x):
                rows.append(row)
                if row["skipped"] is None:
                    lines.show(row)
                else:
                    print(f"{batch:>5} {row['candidate']:<20} skipped: {row['skipped']}")
            say_speedups(rows, batch)
        self.finish("model", rows, None, draw_models, convention=bench_model.CONVENTION)
        return 0

    def _model(self) -> tuple[nn.Module | None, str]:
        """The model and its name in tables; no model for an engine folder."""
        if self.target is None:
            tasks = parse_tasks("--tasks", self.tasks)
            split = parse_prune("--prune", self.prune, tasks)
            heads = parse_structure(self.head_structure)
            model: nn.Module = prune(build(self.model, tasks), split, heads)
            blocks = f", heads in {heads}" if heads.grouped else ""
            return model.eval(), f"{self.model} {self.prune}{blocks}"
        if (self.target / ENGINE_FILE).is_file():
            return None, str(self.target)
        if not self.target.is_dir():
            raise ValueError(
                f"Expected a run folder or an engine folder, got {self.target}, which is neither"
            )
        return load_model(RunFolder(self.target)).float().eval(), str(self.target)

    def _rows(
        self, model: nn.Module | None, case: str, names: list[str], x: torch.Tensor
    ) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            if model is None:
                assert self.target is not None
                own = engine_peer(self.precision)
                candidates = [Candidate("engine", self.target, own.load(self.target, x))]
                reason = "an engine folder holds no torch module; name the run folder"
                candidates += [Candidate(name, why_not=reason) for name in names]
                expected, work = {}, {}
            else:
                peers = [engine_peer(self.precision), *(PEERS[name] for name in names)]
                candidates = bench_model.prepare(peers, model, x, Path(folder))
                engine = candidates[0]
                if engine.predict is None:
                    raise RuntimeError(f"bench model: the engine cannot run it: {engine.why_not}")
                on_device = model if x.is_cpu else copy.deepcopy(model).to(x.device)
                with torch.no_grad():
                    expected = {task: y.float() for task, y in on_device(x).items()}
                work = work_of(model, x)
            bench_model.check(candidates, expected, x, narrow_engine=self._narrow)
            wait = torch.cuda.synchronize if x.is_cuda else bench_model.at_once
            bench_model.time_in_turns(candidates, x, self.rounds, self.seconds, wait)
            rows = []
            for candidate in candidates:
                own_kind = candidate.name == "engine" and self._narrow
                best = bench_model.fastest(candidates, own_kind or "bf16" in candidate.name)
                more = {**work, **self._footprint(candidate, x)}
                if isinstance(candidate.predict, Engine):
                    more["executed_gmac"] = executed_macs(candidate.predict, x)
                    more["precision"] = self.precision
                    more["runs_on"] = candidate.predict.explain(tuple(x.shape)).where or "cpu"
                rows.append(
                    bench_model.row(candidate, case, work.get("zeros", 0.0), len(x), best, more)
                )
            return rows

    @property
    def _narrow(self) -> bool:
        return self.precision != "float32"

    def _footprint(self, candidate: Candidate, x: torch.Tensor) -> dict[str, Any]:
        """Bytes of its file; peak memory and load time of a fresh process."""
        if candidate.predict is None or candidate.saved is None:
            return {"file_mb": None, "peak_mb": None, "load_s": None}
        found: dict[str, Any] = {"file_mb": round(file_bytes(candidate.saved) / 1e6, 2)}
        if not self.memory:
            return {**found, "peak_mb": None, "load_s": None}
        task = {
            "candidate": candidate.name,
            "saved": str(candidate.saved),
            "shape": list(x.shape),
            "threads": torch.get_num_threads(),
            "device": str(x.device),
            "precision": self.precision,
        }
        done = subprocess.run(
            [sys.executable, "-m", "sparsemtl.cli.bench_child", json.dumps(task)],
            capture_output=True,
            text=True,
            timeout=CHILD_LIMIT,
            check=False,
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {**found, "peak_mb": None, "load_s": None, "memory_why_not": last}
        return {**found, **json.loads(done.stdout.strip().splitlines()[-1])}


def work_of(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Multiply-adds of one prediction, dense and of nonzero weights alone, in 10^9."""
    total = count_flops(model, tuple(x.shape)).total
    return {
        "zeros": round(total.sparsity, 4),
        "dense_gmac": round(total.dense_mac / 1e9, 3),
        "theoretical_gmac": round(total.sparse_mac / 1e9, 3),
    }


def parse_shape(flag: str, text: str) -> tuple[int, int, int, int]:
    """«1,3,321,321» → four integers ≥ 1.   raises: ValueError naming the flag"""
    parts = text.replace("x", ",").split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"Expected {flag} like 1,3,321,321 (B,C,H,W, each >= 1), got {text!r}")
    batch, channels, height, width = (int(part) for part in parts)
    return batch, channels, height, width


def say_speedups(rows: list[dict[str, Any]], batch: int) -> None:
    """How much faster the engine is than the fastest peer of each precision."""
    own = [row for row in rows if row["batch"] == batch]
    engine = next(row for row in own if row["candidate"] == "engine")
    for precision, wanted in (("float32", False), ("bf16", True)):
        peers = [
            row
            for row in own
            if row is not engine
            and row["median_ms"] is not None
            and ("bf16" in row["candidate"]) is wanted
        ]
        if peers:
            best = min(peers, key=lambda row: row["median_ms"])
            print(
                f"batch {batch}: the engine is {best['median_ms'] / engine['median_ms']:.2f}× as "
                f"fast as the fastest {precision} peer, {best['candidate']}"
            )
    if "dense_gmac" in engine:
        print(
            f"batch {batch}: {engine['dense_gmac']} GMAC dense, {engine['theoretical_gmac']} of "
            f"nonzero weights, {engine['executed_gmac']} executed ({bench_model.CONVENTION})"
        )


def draw_models(rows: Any, machine: str) -> Any:
    from sparsemtl.report.bench_plots import model_times

    return model_times(rows, machine)
