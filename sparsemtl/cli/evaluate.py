"""`sparsemtl evaluate`: every metric of a finished run, and Δ against another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsemtl.cli.run_folder import RunFolder, build_split, build_tasks, load_model, read_json
from sparsemtl.cli.runner import baseline_summary, compute_delta, no_delta
from sparsemtl.cli.tables import print_evaluation
from sparsemtl.errors import unknown_choice
from sparsemtl.measure.environment import environment
from sparsemtl.models.component import find_components
from sparsemtl.sparsity.stats import sparsity_report
from sparsemtl.tasks.delta import FORMS
from sparsemtl.training import runtime
from sparsemtl.training.checkpoint import write_json
from sparsemtl.training.evaluate import evaluate

SPLITS = ("train", "val", "test")


@dataclass
class Evaluate:
    """Measure every metric of every task of a finished run's model."""

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Run folder that `sparsemtl train` left."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the results here too."""
    baseline: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Run folder or summary to compare with; the run's own baseline where it has one."""
    split: str = "test"
    """train, val or test."""
    delta_form: str = "mean"
    """mean (Eq. 7) or sum (as the published tables)."""
    batch_size: int = 1

    def run(self) -> int:
        for name, value, choices in (
            ("--split", self.split, SPLITS),
            ("--delta-form", self.delta_form, FORMS),
        ):
            if value not in choices:
                raise ValueError(unknown_choice(name, value, choices))
        if self.batch_size < 1:
            raise ValueError(f"Expected --batch-size >= 1, got {self.batch_size}")
        folder = RunFolder(self.run_folder)
        config = folder.load_config()
        device = runtime.start(config.train.runtime, config.train.seed)
        model = load_model(folder).to(device)
        dataset = build_split(config, self.split)
        tasks = build_tasks(config, dataset)
        metrics = evaluate(model, tasks, dataset, batch_size=self.batch_size)
        result: dict[str, Any] = {
            "run": str(self.run_folder),
            "split": self.split,
            "samples": len(dataset),
            "metrics": metrics,
            "sparsity": sparsity_report(model, find_components(model)).to_json(),
            "environment": environment(),
        }
        result["delta"] = self._delta(folder, tasks, result)
        if self.json is not None:
            write_json(self.json, result)
        print_evaluation(result)
        return 0

    def _delta(self, folder: RunFolder, tasks: Any, result: dict[str, Any]) -> dict[str, Any]:
        if self.baseline is not None:
            name, reference = str(self.baseline), baseline_summary(str(self.baseline))
        elif folder.baseline.summary.exists():
            name, reference = "baseline (dense twin)", read_json(folder.baseline.summary, "a run")
        else:
            return no_delta(self.delta_form, "no reference run was named; see --baseline")
        if self.split != reference.get("metrics_split", reference.get("split")):
            return no_delta(self.delta_form, "the reference was measured on another split", name)
        return compute_delta(tasks, result, reference, name, self.delta_form)
