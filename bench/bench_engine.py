"""A pruned multitask network in the engine's CPU executor against torch's fused dense convolutions.

    python -m bench.bench_engine --model deeplab-resnet34 --prune adapmtl --batch 1 --threads 2
    pytest bench/bench_engine.py                                        pytest-benchmark

Every layer is pruned by magnitude to its component's share, so that no layer is emptied by chance
of its initialisation. Dense is the engine's own torch executor (prepacked, fused, channels last),
which is at least as fast as a channels_last model; both take turns. Nothing is reported unless the
outputs agree with the model's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import pytest
import torch
from torch import Tensor

from bench.machine import RESULTS, machine, text
from sparsemtl.engine.capture import capture
from sparsemtl.engine.executors.dense import DenseExecutor
from sparsemtl.engine.executors.native import NativeExecutor
from sparsemtl.engine.graph import Graph
from sparsemtl.engine.passes import adapt, optimise
from sparsemtl.engine.select import Selection, executor_of, select
from sparsemtl.engine.shapes import specialise
from sparsemtl.models import MultitaskModel
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.timing import Timing, interleave

HEADS = {"segmentation": 40, "normals": 3, "depth": 1}
# Facts of the published split (AdapMTL, NYUv2, 90 %).
ADAPMTL = {
    "backbone": 0.717, "head:segmentation": 0.932, "head:normals": 0.993, "head:depth": 0.962,
}  # fmt: skip
TOLERANCE = 1e-4


def pruned(name: str, prune: str, width: float = 1.0) -> MultitaskModel:
    """A seeded model in evaluation mode with statistics as after training.

    prune: "adapmtl", or the share of each layer's weights to remove
    """
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, width=width), HEADS).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.running_mean, 0.0, 0.1)
    with torch.no_grad():
        for component in model.components().values():
            share = ADAPMTL[component.name] if prune == "adapmtl" else float(prune)
            for weight in component.weights:
                dead = weight.abs().flatten().argsort()[: round(share * weight.numel())]
                weight.view(-1)[dead] = 0.0
    return model


def plan(model: MultitaskModel, x: Tensor) -> Graph:
    """The model's graph as an engine would run it at this size."""
    graph, _ = optimise(capture(model, (x[:1],)))
    graph, _ = adapt(specialise(graph, [tuple(x.shape)]))
    return graph


def worst_error(
    executor: NativeExecutor | DenseExecutor, model: MultitaskModel, x: Tensor
) -> float:
    """Largest difference from the model's outputs, relative to the largest output of its task."""
    with torch.no_grad():
        expected = model(x)
    got = executor(x)
    errors = [(got[t] - y).abs().max() / y.abs().max() for t, y in expected.items()]
    return max(error.item() for error in errors)


def row(args: argparse.Namespace, timings: dict[str, Timing], error: float, peak: int) -> dict:
    engine, dense = timings["engine"], timings["dense"]
    return {
        "model": args.model, "prune": args.prune, "input": [args.batch, 3, args.size, args.size],
        "select": args.select, "engine_ms": round(engine.median * 1e3, 2),
        "dense_ms": round(dense.median * 1e3, 2),
        "speedup": round(dense.median / engine.median, 3),
        "speedup_of_best": round(dense.best / engine.best, 3),
        "spread": round(engine.spread, 3), "rounds": engine.rounds, "rel_err": error,
        "peak_activation_bytes": peak,
    }  # fmt: skip


def slowest(executor: NativeExecutor, selection: Selection, x: Tensor, count: int) -> list[str]:
    """The steps that take longest, the best of three runs each."""
    runs = [executor.profile(x) for _ in range(3)]
    steps = [min(times, key=lambda t: t.seconds) for times in zip(*runs, strict=True)]
    steps.sort(key=lambda step: -step.seconds)
    lines = []
    for step in steps[:count]:
        choice = selection.layers.get(step.node)
        kernel = "" if choice is None else f"{choice.choice}, density {choice.density:.3f}"
        lines.append(f"{step.seconds * 1e3:9.3f} ms  {step.what:10s} {step.node}  {kernel}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="deeplab-resnet34")
    parser.add_argument("--prune", default="adapmtl", help="adapmtl, or a share such as 0.9")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=321)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--select", default="measured")
    parser.add_argument("--steps", type=int, default=0, help="print this many of the slowest steps")
    parser.add_argument("--record", action="store_true", help="append to bench/results/engine.json")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    print(text(machine()), flush=True)
    model = pruned(args.model, args.prune)
    x = torch.randn(args.batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(1))
    graph = plan(model, x)
    begin = time.perf_counter()
    selection = select(graph, args.select)
    print(f"selected in {time.perf_counter() - begin:.1f} s; the whole runs {selection.whole}")
    executor = executor_of(graph, selection)
    error = worst_error(executor, model, x)
    if not error < TOLERANCE:
        print(f"engine: outputs differ by {error:.1e}, nothing is reported")
        return 1
    dense = DenseExecutor(graph)
    calls = {"engine": lambda: executor(x), "dense": lambda: dense(x)}
    timings = interleave(calls, args.rounds, 2)
    peak = executor.peak_bytes if isinstance(executor, NativeExecutor) else 0
    found = row(args, timings, error, peak)
    print(json.dumps(found))
    if args.steps and isinstance(executor, NativeExecutor):
        print("\n".join(slowest(executor, selection, x, args.steps)))
    if args.record:
        record(found)
    return 0


def record(found: dict) -> None:
    """Put a row into the results, in place of one of the same case."""
    path = RESULTS / "engine.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    case = ("model", "prune", "input", "select", "machine")
    found = {**found, "machine": machine()}
    del found["machine"]["revision"]  # type: ignore[attr-defined]  # rows are of several
    rows = [r for r in rows if [r[k] for k in case] != [found[k] for k in case]]
    path.write_text(json.dumps({"rows": [*rows, found]}, indent=1) + "\n")


@pytest.mark.parametrize("kind", ["engine", "dense"])
def test_bench_a_small_network(benchmark, kind):
    model = pruned("deeplab-resnet18", "0.9", width=0.125)
    x = torch.randn(1, 3, 97, 97, generator=torch.Generator().manual_seed(1))
    graph = plan(model, x)
    executor = executor_of(graph, select(graph, "sparse" if kind == "engine" else "dense"))
    assert worst_error(executor, model, x) < TOLERANCE
    benchmark.pedantic(executor, args=(x,), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())
