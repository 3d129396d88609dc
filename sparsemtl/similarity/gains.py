"""Co-training gains: what a task has from sharing its network with another one.

gain[a, b] = Δ of task a (Eq. 7 of AdapMTL, percent) when trained together with b, against a
trained alone; the pair's gain is the mean of both. A gains file holds them as `task_a, task_b,
gain` in tab-separated lines, `task_a`'s gain from `task_b`, or the pair's where only one of the
two orders is given.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite

import numpy as np

from sparsemtl.errors import unknown_choice
from sparsemtl.similarity.analysis import check_tasks, pairs_of
from sparsemtl.similarity.layer_weights import Array
from sparsemtl.tasks.delta import delta

Metrics = Mapping[str, Mapping[str, float]]  # task → metric → value
HEADER = ("task_a", "task_b", "gain")


def cells_of(tasks: Sequence[str]) -> list[tuple[str, ...]]:
    """The trainings that all gains need: every task alone, and every pair."""
    check_tasks(tasks)
    return [*((task,) for task in tasks), *pairs_of(tasks)]


def gain_matrix(
    tasks: Sequence[str],
    measured: Mapping[tuple[str, ...], Metrics],
    directions: Mapping[str, Mapping[str, bool]],
) -> Array:
    """Directed gains from measured cells.

    measured:   cell (see `cells_of`) → its tasks' metrics
    directions: task → metric → higher is better
    returns:    [T, T], NaN on the diagonal; [a, b] is a's gain from b
    raises:     ValueError for a missing cell, or a reference that cannot be divided by
    """
    missing = [cell for cell in cells_of(tasks) if cell not in measured]
    if missing:
        raise ValueError(f"gain_matrix: Expected a training of {missing[0]}, got none")
    gains = np.full((len(tasks), len(tasks)), np.nan)
    for a, task in enumerate(tasks):
        alone = measured[(task,)]
        for b, other in enumerate(tasks):
            if a == b:
                continue
            cell = (task, other) if a < b else (other, task)
            try:
                found = delta(measured[cell], alone, {task: directions[task]})
            except ValueError as error:
                raise ValueError(
                    f"gain_matrix: {error}. Task {task!r} alone is no reference: train it longer"
                ) from error
            gains[a, b] = found["overall"]
    return gains


def pair_gains(gains: Array) -> list[float]:
    """The mean of both directions, in the order of `pairs_of`."""
    tasks = len(gains)
    return [
        float((gains[a, b] + gains[b, a]) / 2) for a in range(tasks) for b in range(a + 1, tasks)
    ]


def write_gains(tasks: Sequence[str], gains: Array) -> str:
    """The text of a gains file."""
    lines = ["\t".join(HEADER)]
    for a, task in enumerate(tasks):
        for b, other in enumerate(tasks):
            if a != b:
                lines.append(f"{task}\t{other}\t{gains[a, b]:.6g}")
    return "\n".join(lines) + "\n"


def read_gains(text: str, tasks: Sequence[str], where: str = "gains") -> Array:
    """Gains of every pair of `tasks` from a gains file; other tasks in it are left out.

    raises: ValueError naming the line for a bad number or a repeated pair, or the missing pair
    """
    found: dict[tuple[str, str], float] = {}
    for number, row in _rows(text, where):
        a, b, value = row
        try:
            gain = float(value)
        except ValueError:
            gain = float("nan")
        if not isfinite(gain):
            raise ValueError(f"{where}, line {number}: Expected a finite gain, got {value!r}")
        if a == b or (a, b) in found:
            raise ValueError(f"{where}, line {number}: Expected each pair once, got {a}, {b}")
        found[a, b] = gain
    gains = np.full((len(tasks), len(tasks)), np.nan)
    for i, task in enumerate(tasks):
        for j, other in enumerate(tasks):
            if i == j:
                continue
            known_gain = found.get((task, other), found.get((other, task)))
            if known_gain is None:
                known = sorted({name for pair in found for name in pair})
                problem = next((t for t in (task, other) if t not in known), None)
                hint = f" {unknown_choice('each task', problem, known)}" if problem else ""
                raise ValueError(f"{where}: Expected a gain of {task}, {other}, got none.{hint}")
            gains[i, j] = known_gain
    return gains


def _rows(text: str, where: str) -> Iterable[tuple[int, list[str]]]:
    """Numbered data lines of three cells; the header, empty lines and # comments are skipped."""
    for number, row in enumerate(csv.reader(io.StringIO(text), delimiter="\t"), start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or cells[0].startswith("#") or tuple(cells[:3]) == HEADER:
            continue
        if len(cells) != len(HEADER):
            raise ValueError(
                f"{where}, line {number}: Expected {', '.join(HEADER)} separated by tabs, "
                f"got {len(cells)} cells"
            )
        yield number, cells
