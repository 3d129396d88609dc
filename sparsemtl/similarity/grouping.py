"""Which tasks to train together: the best partition under a budget of networks.

A partition's value is the mean over tasks of the task's mean affinity to the others of its group;
a task alone in its network is worth `alone`. The poster only announces groupings; the objective
is ours and follows Standley et al. (2020) in predicting a group from its pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsemtl.similarity.layer_weights import Array

MOST_EXHAUSTIVE = 8  # tasks: 4 140 partitions
STARTS = 16  # of the bounded search
ROUNDS = 200  # of moves from one start

Partition = tuple[tuple[int, ...], ...]
Labels = npt.NDArray[np.int64]  # [T], a task's group


@dataclass(frozen=True)
class Grouping:
    """groups: indices of tasks, sorted; value: of the partition; exhaustive: every one was seen."""

    groups: Partition
    value: float
    exhaustive: bool


def best_grouping(affinity: Array, budget: int, alone: float) -> Grouping:
    """The best partition into at most `budget` groups.

    affinity: [T, T]; [a, b] is what task a has from b. Only off-diagonal values count, and they
              need not be symmetric
    budget:   networks that may be trained, at least 1
    alone:    value of a task that has a network to itself: 1 for similarities, 0 for gains
    raises:   ValueError for a matrix that is not square or finite off the diagonal, or budget < 1
    """
    affinity = np.asarray(affinity, dtype=np.float64)
    if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1] or not len(affinity):
        raise ValueError(
            f"best_grouping: Expected affinity of shape [T, T], got {list(affinity.shape)}"
        )
    if budget < 1:
        raise ValueError(f"best_grouping: Expected budget >= 1, got {budget}")
    others = ~np.eye(len(affinity), dtype=bool)
    if not np.isfinite(affinity[others]).all():
        raise ValueError("best_grouping: Expected finite affinities, got NaN or inf")
    affinity = np.where(others, affinity, 0.0)  # a diagonal of NaN would spread
    if len(affinity) <= MOST_EXHAUSTIVE:
        candidates = list(_partitions(len(affinity), budget))
        best = max(candidates, key=lambda p: (_round(grouping_value(affinity, p, alone)), -len(p)))
        return Grouping(best, grouping_value(affinity, best, alone), True)
    return _search(affinity, budget, alone)


def grouping_value(affinity: Array, groups: Sequence[Sequence[int]], alone: float) -> float:
    """The value of one partition."""
    total = 0.0
    for group in groups:
        if len(group) == 1:
            total += alone
            continue
        part = affinity[np.ix_(list(group), list(group))]
        total += (part.sum() - np.trace(part)) / (len(group) - 1)
    return float(total / sum(len(group) for group in groups))


def _round(value: float) -> float:
    """Sums in another order differ in the last bits; those decide nothing."""
    return round(value, 12)


def _partitions(tasks: int, budget: int) -> Iterator[Partition]:
    """All partitions of 0..tasks-1 into at most `budget` groups, each once."""

    def extend(number: int, groups: list[list[int]]) -> Iterator[Partition]:
        if number == tasks:
            yield tuple(tuple(group) for group in groups)
            return
        for group in groups:
            group.append(number)
            yield from extend(number + 1, groups)
            group.pop()
        if len(groups) < budget:
            groups.append([number])
            yield from extend(number + 1, groups)
            groups.pop()

    return extend(0, [])


def _search(affinity: Array, budget: int, alone: float) -> Grouping:
    """Merging from single tasks, and seeded random starts, each improved by moves and swaps."""
    generator = np.random.default_rng(0)
    starts = [_merged(affinity, budget, alone)]
    for _ in range(STARTS - 1):
        starts.append(generator.integers(0, min(budget, len(affinity)), len(affinity)))
    best: tuple[float, Labels] | None = None
    for labels in starts:
        value, improved = _improve(affinity, labels.copy(), budget, alone)
        if best is None or value > best[0]:
            best = value, improved
    assert best is not None
    groups = sorted(_groups(best[1]))
    return Grouping(tuple(groups), grouping_value(affinity, groups, alone), False)


def _merged(affinity: Array, budget: int, alone: float) -> Labels:
    """Labels after joining, again and again, the two groups that it costs least to join."""
    groups: list[tuple[int, ...]] = [(task,) for task in range(len(affinity))]
    while len(groups) > budget:
        options = []
        for a in range(len(groups)):
            for b in range(a + 1, len(groups)):
                rest = [g for i, g in enumerate(groups) if i not in (a, b)]
                joined = [*rest, groups[a] + groups[b]]
                options.append((_round(grouping_value(affinity, joined, alone)), -a, -b, joined))
        groups = max(options)[3]
    labels = np.zeros(len(affinity), dtype=np.int64)
    for label, group in enumerate(groups):
        labels[list(group)] = label
    return labels


def _improve(affinity: Array, labels: Labels, budget: int, alone: float) -> tuple[float, Labels]:
    """The best single move or swap, until none improves or the rounds are used up."""
    value = _round(grouping_value(affinity, _groups(labels), alone))
    for _ in range(ROUNDS):
        best, step = value, None
        for neighbour in _neighbours(labels, budget):
            other = _round(grouping_value(affinity, _groups(neighbour), alone))
            if other > best:
                best, step = other, neighbour
        if step is None:
            break
        value, labels = best, step
    return value, labels


def _neighbours(labels: Labels, budget: int) -> Iterator[Labels]:
    for task in range(len(labels)):
        for label in range(min(budget, len(labels))):
            if label != labels[task]:
                moved = labels.copy()
                moved[task] = label
                yield moved
    for a in range(len(labels)):
        for b in range(a + 1, len(labels)):
            if labels[a] != labels[b]:
                swapped = labels.copy()
                swapped[a], swapped[b] = labels[b], labels[a]
                yield swapped


def _groups(labels: Labels) -> list[tuple[int, ...]]:
    return [tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)]
