"""`sparsemtl similarity`: which tasks belong together, told from fresh networks."""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from sparsemtl import config as configs
from sparsemtl.cli.similarity_findings import Findings, Options
from sparsemtl.cli.similarity_folder import SimilarityFolder
from sparsemtl.cli.similarity_report import print_findings, write_report
from sparsemtl.cli.similarity_work import Work, collect_records, measure_gains
from sparsemtl.cli.train import Folder, Number, Text, Train, Whole, Words
from sparsemtl.data import build_dataset
from sparsemtl.data.copies import check_copies
from sparsemtl.errors import unknown_choice
from sparsemtl.measure.environment import environment
from sparsemtl.similarity import AGGREGATES, INDEXINGS, METRICS, WEIGHTS, SimilarityConfig
from sparsemtl.similarity.analysis import check_tasks
from sparsemtl.similarity.gains import read_gains

Many = tyro.conf.arg(help_behavior_hint="")


@dataclass
class Similarity:
    """Score how alike tasks are on fresh networks, and group them; no training needed.

    Leaves a folder with a report, tables and heat maps. Interrupted, the same command goes on.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the analysis: new, or one of the same settings."""
    tasks: Words = ()
    """Tasks to compare, by default the preset's. NEW=TASK adds a task a second time."""
    preset: str = "demo"
    """Where data, model and training settings come from; `train` explains them."""
    data: Text = None
    data_root: Folder = None
    data_option: Words = ()
    model: Text = None
    width: Number = None
    set: Words = ()
    """Any other field, for example model.dropout=0 train.runtime.threads=2."""
    metric: Words = METRICS
    """Metrics in the report: epi, iou, css, mcss."""
    layer_weights: str = "equal"
    """equal, linear, linear-plus-one, five-zeros, sparsity or min-sparsity; the tables hold all."""
    indexing: str = "layer"
    """layer, or filter: sparsity weights with the released code's indexing error."""
    aggregate: str = "mean"
    """mean (weights of mean 1) or unscaled."""
    seeds: Annotated[tuple[int, ...], Many] = (0, 1, 2, 3)
    sparsities: Annotated[tuple[float, ...], Many] = (0.3, 0.5, 0.7, 0.9)
    """Over backbone and own head together."""
    batches: int = 5
    batch_size: int = 8
    keep: str = "exact"
    """exact, or disparse-nyuv2: the released table of keep ratios."""
    init: str = "xavier"
    """Weights for scoring: xavier, or own (as the network draws them)."""
    empty: str = "equal"
    """What a layer counts in which neither task keeps a weight: equal (1) or released."""
    iou_keep: float = 0.078
    """Keep ratio of DiSparse's layer-wise IoU profile."""
    grouping_budget: Whole = None
    """Networks that may be trained; every budget if not given."""
    gains: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Co-training gains to compare with: task_a, task_b, gain in tab-separated lines."""
    measure_gains: bool = False
    """Measure them: train every task alone and every pair."""
    gain_steps: int = 300
    """Optimizer steps of each of these trainings."""
    gain_seeds: Annotated[tuple[int, ...], Many] = (0,)
    name: str = "similarity"
    """Stem of the report's files."""
    quiet: bool = False

    def run(self) -> int:
        begin = time.perf_counter()
        work, settings, options = self._work(), self._settings(), self._options()
        names = list(work.names)
        given = self._read_gains(names)
        # Everything that can be refused is, before the folder is touched.
        if work.copies:
            check_copies(build_dataset(work.config.data, "train"), work.copies)
        work.split("train", names, augmented=False)
        if self.measure_gains:
            work.split("val", names, augmented=False)
        folder = SimilarityFolder(self.out)
        folder.open(
            {
                "format": 1,
                "tasks": names,
                "copies": dict(work.copies),
                "similarity": dataclasses.asdict(settings),
                "data": configs.to_json(work.config)["data"],
                "model": configs.to_json(work.config)["model"],
                "task_options": configs.to_json(work.config)["task_options"],
            }
        )
        say = _silent if self.quiet else _say
        records = collect_records(work, settings, folder, say)
        gains = [given] if given is not None else []
        if self.measure_gains:
            train = configs.to_json(work.config)["train"]
            folder.open_gains({"format": 1, "seeds": list(self.gain_seeds), "train": train})
            gains = measure_gains(work, self.gain_seeds, folder, say)
        findings = Findings(
            records=records,
            settings=settings,
            options=options,
            gains=np.array(gains) if gains else None,
            measured=self.measure_gains,
            gain_steps=self.gain_steps,
            gain_seeds=self.gain_seeds,
            config=work.config,
            seconds=time.perf_counter() - begin,
            environment=environment(),
        )
        written = write_report(findings, self.out, self.name)
        print_findings(findings)
        print(f"{', '.join(path.name for path in written)} are in {self.out}")
        return 0

    def _work(self) -> Work:
        """The run whose data and network are scored."""
        copies = dict(word.split("=", 1) for word in self.tasks if "=" in word)
        names = [word.split("=", 1)[0] for word in self.tasks]
        sources = tuple(dict.fromkeys(copies.get(name, name) for name in names))
        config = Train(
            preset=self.preset,
            data=self.data,
            data_root=self.data_root,
            data_option=self.data_option,
            model=self.model,
            width=self.width,
            tasks=sources,
            steps=self.gain_steps,
            baseline="none",
            set=self.set,
        ).config()
        names = names or list(config.tasks)
        check_tasks(names)
        return Work(config, tuple(names), copies)

    def _settings(self) -> SimilarityConfig:
        fields = (f.name for f in dataclasses.fields(SimilarityConfig))
        return SimilarityConfig(**{name: getattr(self, name) for name in fields})

    def _options(self) -> Options:
        for name, value, choices in (
            ("--layer-weights", self.layer_weights, WEIGHTS),
            ("--indexing", self.indexing, INDEXINGS),
            ("--aggregate", self.aggregate, AGGREGATES),
            *(("--metric", metric, METRICS) for metric in self.metric),
        ):
            if value not in choices:
                raise ValueError(unknown_choice(name, value, choices))
        if not self.metric or len(set(self.metric)) != len(self.metric):
            raise ValueError(f"Expected each --metric once, got {list(self.metric)}")
        if self.grouping_budget is not None and self.grouping_budget < 1:
            raise ValueError(f"Expected --grouping-budget >= 1, got {self.grouping_budget}")
        if self.gains is not None and self.measure_gains:
            raise ValueError("Expected either --gains FILE or --measure-gains, got both")
        if not self.gain_seeds or len(set(self.gain_seeds)) != len(self.gain_seeds):
            raise ValueError(f"Expected each of --gain-seeds once, got {list(self.gain_seeds)}")
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"Expected --name to be a file's stem, got {self.name!r}")
        return Options(
            tuple(self.metric),
            self.layer_weights,
            self.indexing,
            self.aggregate,
            self.grouping_budget,
        )

    def _read_gains(self, names: list[str]) -> Any:
        if self.gains is None:
            return None
        try:
            text = self.gains.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"Expected --gains to name a text file, got {error}") from error
        return read_gains(text, names, str(self.gains))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass
