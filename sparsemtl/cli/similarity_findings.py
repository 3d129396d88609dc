"""What a similarity analysis found, and the words in which its report and terminal tell it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsemtl.config import RunConfig
from sparsemtl.similarity import (
    METRICS,
    SeedRecord,
    SimilarityConfig,
    best_grouping,
    correlate,
    ordering_agreement,
    pairs_of,
    similarity_matrix,
)
from sparsemtl.similarity.gains import pair_gains
from sparsemtl.similarity.grouping import Grouping

LABELS = {"epi": "EPI-Sim", "iou": "IoU", "css": "CSS", "mcss": "MCSS"}


@dataclass(frozen=True)
class Options:
    """What is shown of the records."""

    metrics: tuple[str, ...] = METRICS
    layer_weights: str = "equal"
    indexing: str = "layer"
    aggregate: str = "mean"
    grouping_budget: int | None = None


@dataclass(frozen=True)
class Findings:
    """Records and gains of one analysis, and everything the report says about them.

    gains: [seeds, T, T] directed, percent, or None
    """

    records: Sequence[SeedRecord]
    settings: SimilarityConfig
    options: Options
    gains: np.ndarray | None
    measured: bool
    gain_steps: int
    gain_seeds: tuple[int, ...]
    config: RunConfig
    seconds: float
    environment: dict[str, Any]

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.records[0].tasks

    def matrix(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean over sparsities and seeds, deviation over seeds; [T, T] each."""
        o = self.options
        return similarity_matrix(self.records, metric, o.layer_weights, o.indexing, o.aggregate)

    def mean_gains(self) -> np.ndarray:
        """[T, T], over the seeds of the trainings."""
        assert self.gains is not None
        return np.asarray(self.gains.mean(axis=0))

    def correlations(self) -> dict[str, dict[str, Any]]:
        """Metric → how its order of the pairs agrees with that of the gains."""
        gains, found = self.mean_gains(), {}
        for metric in self.options.metrics:
            matrix = self.matrix(metric)[0]
            agree, total = ordering_agreement(matrix, gains)
            found[metric] = {
                **correlate(pair_values(matrix), pair_gains(gains)),
                "ordering_agree": agree,
                "ordering_total": total,
            }
        return found

    def groupings(self) -> list[tuple[int, str, Grouping]]:
        """(budget, by what, grouping) for each metric and, where known, the gains."""
        budgets = [self.options.grouping_budget or 0]
        if self.options.grouping_budget is None:
            budgets = list(range(1, len(self.tasks)))
        found = []
        for budget in budgets:
            for metric in self.options.metrics:
                found.append((budget, metric, best_grouping(self.matrix(metric)[0], budget, 1.0)))
            if self.gains is not None:
                found.append((budget, "gains", best_grouping(self.mean_gains(), budget, 0.0)))
        return found


def pair_table(findings: Findings) -> list[list[str]]:
    columns = {m: findings.matrix(m) for m in findings.options.metrics}
    header = ["pair", *(LABELS[m] for m in columns)]
    if findings.gains is not None:
        header.append("gain %")
    rows = [header]
    upper = {m: (pair_values(mean), pair_values(std)) for m, (mean, std) in columns.items()}
    gains = pair_gains(findings.mean_gains()) if findings.gains is not None else None
    for p, (a, b) in enumerate(pairs_of(findings.tasks)):
        row = [f"{a} / {b}", *(f"{mean[p]:.3f} ± {std[p]:.3f}" for mean, std in upper.values())]
        rows.append(row if gains is None else [*row, f"{gains[p]:+.2f}"])
    return rows


def pair_values(matrix: np.ndarray) -> list[float]:
    """The pairs' values, in the order of `pairs_of`."""
    return [float(v) for v in matrix[np.triu_indices(len(matrix), 1)]]


def group_text(tasks: Sequence[str], grouping: Grouping) -> str:
    return " · ".join("{" + ", ".join(tasks[t] for t in group) + "}" for group in grouping.groups)


def signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.2f}"


def command_line() -> str:
    return shlex.join(["sparsemtl", *sys.argv[1:]])
