"""Methods compared at one budget: from the summaries of single runs to AdapMTL's Table 1.

A cell is one run: a method, a sparsity, a seed. Rows join the cells of a method and a sparsity over
the seeds. Δ of a cell is taken against the reference method's metrics, averaged over its seeds, so
that one lucky seed of the reference does not move every row.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparsemtl.tasks.delta import delta

Directions = Mapping[str, Mapping[str, bool]]  # task → metric → higher is better


@dataclass(frozen=True)
class Cell:
    """One run.   method: as the user names it, options included   sparsity: None for dense"""

    method: str
    sparsity: float | None
    seed: int

    @property
    def name(self) -> str:
        """A folder's name: the same cell has the same one, whatever else is compared."""
        words = re.sub(r"[^A-Za-z0-9.=_-]+", "_", self.method).strip("_")
        target = "" if self.sparsity is None else f"-{100 * self.sparsity:g}"
        return f"{words}{target}-seed{self.seed}"


class Stat(NamedTuple):
    """Mean and sample standard deviation over seeds; std is None for one seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat:
        if any(not math.isfinite(v) for v in values):
            return cls(math.nan, None)
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """A method at a sparsity, over its finished seeds."""

    method: str
    sparsity: float | None  # as requested
    seeds: tuple[int, ...]
    metrics: dict[str, dict[str, Stat]]
    delta: dict[str, Stat]  # task → Δ_Ti; empty without a reference
    overall_delta: Stat | None
    zeros: Stat  # overall sparsity, as counted
    components: dict[str, Stat]  # component → sparsity
    seconds: Stat
    failed: tuple[int, ...] = ()  # seeds whose run failed


def check_grid(methods: Sequence[str], sparsities: Sequence[float], seeds: Sequence[int]) -> None:
    """raises ValueError for an empty list, or for one that holds something twice."""
    for name, values in (("methods", methods), ("sparsity", sparsities), ("seeds", seeds)):
        if not values:
            raise ValueError(f"compare: Expected at least one of {name}, got none")
        twice = sorted({str(v) for v in values if list(values).count(v) > 1})
        if twice:
            raise ValueError(f"compare: Expected each of {name} once, got {', '.join(twice)} twice")
    for value in sparsities:
        if not 0.0 < value < 1.0:
            raise ValueError(f"compare: Expected sparsity in (0, 1), got {value}")
    for seed in seeds:
        if seed < 0:
            raise ValueError(f"compare: Expected seeds >= 0, got {seed}")


def rows_of(
    cells: Sequence[Cell],
    summaries: Mapping[Cell, Mapping[str, Any]],
    directions: Directions,
    reference: str,
    form: str = "mean",
) -> list[Row]:
    """Join the finished cells, in the order of `cells`.

    summaries: of the finished runs
    reference: the method that Δ is taken against; `why_no_delta` tells why there is none
    """
    base = [_metrics(s) for cell, s in summaries.items() if cell.method == reference]
    means = _mean_metrics(base, directions) if base else {}
    rows = []
    for method, sparsity in dict.fromkeys((c.method, c.sparsity) for c in cells):
        own = [c for c in cells if (c.method, c.sparsity) == (method, sparsity)]
        done = [c for c in own if c in summaries]
        if done:
            failed = tuple(c.seed for c in own if c not in summaries)
            found = [summaries[c] for c in done]
            rows.append(_row(method, sparsity, done, found, means, directions, form, failed))
    return rows


def _row(
    method: str,
    sparsity: float | None,
    cells: Sequence[Cell],
    found: Sequence[Mapping[str, Any]],
    base: Mapping[str, Mapping[str, float]],
    directions: Directions,
    form: str,
    failed: tuple[int, ...],
) -> Row:
    metrics = [_metrics(s) for s in found]
    try:
        deltas = [delta(m, base, directions, form) for m in metrics]
    except ValueError:  # no reference, or it has a metric that nothing can be divided by
        deltas = []
    parts = [s["sparsity"]["components"] for s in found]
    return Row(
        method=method,
        sparsity=sparsity,
        seeds=tuple(c.seed for c in cells),
        metrics={
            task: {name: Stat.of([m[task][name] for m in metrics]) for name in names}
            for task, names in directions.items()
        },
        delta={t: Stat.of([d["tasks"][t] for d in deltas]) for t in directions} if deltas else {},
        overall_delta=Stat.of([d["overall"] for d in deltas]) if deltas else None,
        zeros=Stat.of([s["sparsity"]["overall"] for s in found]),
        components={name: Stat.of([p[name] for p in parts]) for name in parts[0]},
        seconds=Stat.of([s["seconds"] for s in found]),
        failed=failed,
    )


def _metrics(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        task: {k: math.nan if v is None else float(v) for k, v in values.items()}
        for task, values in summary["metrics"].items()
    }


def _mean_metrics(
    metrics: Sequence[Mapping[str, Mapping[str, float]]], directions: Directions
) -> dict[str, dict[str, float]]:
    return {
        task: {name: statistics.fmean([m[task][name] for m in metrics]) for name in names}
        for task, names in directions.items()
    }


def why_no_delta(
    summaries: Mapping[Cell, Mapping[str, Any]],
    directions: Directions,
    reference: str,
    form: str = "mean",
) -> str | None:
    """Why there is no Δ: no reference has finished, or it has a metric to divide by that is 0."""
    base = [_metrics(s) for cell, s in summaries.items() if cell.method == reference]
    if not base:
        return f"no Δ: no run of {reference!r}, the reference, has finished"
    means = _mean_metrics(base, directions)
    try:
        delta(means, means, directions, form)
    except ValueError as error:
        return f"no Δ: {error}"
    return None


def verdict(rows: Sequence[Row], directions: Directions, method: str = "adapmtl") -> list[str]:
    """Where `method` does not win, in sentences: each column in which another sparse row is better.

    A lead that is within one standard deviation of either row is called so.
    """
    sentences = []
    for sparsity in dict.fromkeys(r.sparsity for r in rows if r.sparsity is not None):
        rivals = [r for r in rows if r.sparsity == sparsity]
        own = next((r for r in rivals if r.method == method), None)
        if own is None:
            continue
        columns = {title: higher for title, (_, higher) in _values(own, directions).items()}
        stats = {r.method: _values(r, directions) for r in rivals}
        lost = []
        for title, higher in columns.items():
            text = _beaten(method, {name: found[title][0] for name, found in stats.items()}, higher)
            if text is not None:
                lost.append(f"{title} {text}")
        budget = f"At {100 * sparsity:g} %"
        if lost:
            sentences.append(
                f"{budget} {method} does not win {len(lost)} of {len(columns)} columns: "
                + "; ".join(lost)
                + "."
            )
        else:
            sentences.append(f"{budget} {method} wins all {len(columns)} columns.")
    return sentences


def _values(row: Row, directions: Directions) -> dict[str, tuple[Stat | None, bool]]:
    """Column title → (value, higher is better): Δ_T, Δ of each task, every metric."""
    values: dict[str, tuple[Stat | None, bool]] = {"Δ_T": (row.overall_delta, True)}
    values |= {f"Δ {task}": (row.delta.get(task), True) for task in directions}
    for task, names in directions.items():
        values |= {f"{task} {n}": (row.metrics[task][n], higher) for n, higher in names.items()}
    return values


def _beaten(method: str, stats: Mapping[str, Stat | None], higher: bool) -> str | None:
    """«mine against the best (whose)», or None where `method` is the best or nobody can say."""
    mine = stats[method]
    found = [(name, s) for name, s in stats.items() if s is not None and not math.isnan(s.mean)]
    if mine is None or math.isnan(mine.mean):
        return None
    best, stat = (max if higher else min)(found, key=lambda pair: pair[1].mean)
    gap = stat.mean - mine.mean if higher else mine.mean - stat.mean
    if gap <= 0.0:
        return None
    spread = max(mine.std or 0.0, stat.std or 0.0)
    close = ", within one std" if gap <= spread else ""
    return f"{mine.mean:.4g} against {stat.mean:.4g} ({best}{close})"
