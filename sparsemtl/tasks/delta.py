"""Δ: how much better a model is than a reference, in percent.

Δ_t = 100 · Σ_j ±(M_tj - R_tj) / R_tj, divided by the number of metrics in the mean form;
+ where higher is better, - where lower is. Overall Δ is the mean over tasks.
Source: AdapMTL, Eq. 7 (mean form); its Tables 1 and 2 print the sum form.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TypedDict

from sparsemtl.errors import unknown_choice

FORMS = ("mean", "sum")


class Delta(TypedDict):
    """Percent; positive is better than the reference."""

    overall: float
    tasks: dict[str, float]
    form: str


def delta(
    metrics: Mapping[str, Mapping[str, float]],
    reference: Mapping[str, Mapping[str, float]],
    directions: Mapping[str, Mapping[str, bool]],
    form: str = "mean",
) -> Delta:
    """Compare metrics with those of a reference model.

    metrics:    task → metric → value; NaN makes its task and the overall Δ NaN
    reference:  the same of the reference model, given explicitly: there is no default
    directions: task → metric → higher is better (`Task.higher_is_better`): what enters Δ
    form:       "mean" over a task's metrics (Eq. 7), or their "sum" as some tables print
    raises:     ValueError for another form, no task, no metric of a task, one that is missing,
                or a reference that is 0, NaN or infinite
    """
    if form not in FORMS:
        raise ValueError(f"delta: {unknown_choice('form', form, FORMS)}")
    if not directions:
        raise ValueError("delta: Expected directions of at least one task, got none")
    tasks = {}
    for task, higher_is_better in directions.items():
        if not higher_is_better:
            raise ValueError(f"delta: Expected at least one metric of task {task!r}, got none")
        changes = []
        for metric, higher in higher_is_better.items():
            value = _get("metrics", metrics, task, metric)
            base = _get("reference", reference, task, metric)
            if base == 0.0 or not isfinite(base):
                raise ValueError(
                    f"delta: Expected reference {task}/{metric} to be finite and not 0, got {base}"
                )
            changes.append((value - base if higher else base - value) / base)
        total = 100.0 * sum(changes)
        tasks[task] = total / len(changes) if form == "mean" else total
    return Delta(overall=sum(tasks.values()) / len(tasks), tasks=tasks, form=form)


def _get(who: str, values: Mapping[str, Mapping[str, float]], task: str, metric: str) -> float:
    if task not in values:
        raise ValueError(f"delta: Expected {who} to have task {task!r}, got {list(values)}")
    if metric not in values[task]:
        raise ValueError(f"delta: Expected {who} to have {task}/{metric}, got {list(values[task])}")
    return float(values[task][metric])
