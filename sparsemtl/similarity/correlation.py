"""How well similarities order the pairs as measured co-training gains do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from torchmetrics.functional import kendall_rank_corrcoef, spearman_corrcoef

from sparsemtl.similarity.layer_weights import Array


class Correlation(TypedDict):
    """pairs: how many; spearman, kendall (τ-b): in [-1, 1], None where a side is constant."""

    pairs: int
    spearman: float | None
    kendall: float | None


def correlate(similarity: Sequence[float], gains: Sequence[float]) -> Correlation:
    """Rank correlations over pairs of tasks.

    raises: ValueError for lists of different lengths, or values that are not finite
    """
    if len(similarity) != len(gains):
        raise ValueError(
            f"correlate: Expected one gain per similarity, got {len(gains)} and {len(similarity)}"
        )
    a = torch.tensor(list(similarity), dtype=torch.float64)
    b = torch.tensor(list(gains), dtype=torch.float64)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("correlate: Expected finite values, got NaN or inf")
    if len(a) < 2 or len(a.unique()) < 2 or len(b.unique()) < 2:
        return Correlation(pairs=len(a), spearman=None, kendall=None)
    return Correlation(
        pairs=len(a),
        spearman=float(spearman_corrcoef(a, b)),
        kendall=float(kendall_rank_corrcoef(a, b, variant="b")),
    )


def ordering_agreement(similarity: Array, gain: Array) -> tuple[int, int]:
    """The poster's question: does Sim(A, B) < Sim(A, C) mean that A gains less from B than from C?

    similarity: [T, T]    gain: [T, T], [a, b] is task a's gain from training with b
    returns:    (comparisons that agree, all comparisons); ties are left out
    """
    agree = total = 0
    tasks = len(similarity)
    for a in range(tasks):
        for b, c in itertools.combinations([t for t in range(tasks) if t != a], 2):
            left = np.sign(similarity[a, b] - similarity[a, c])
            right = np.sign(gain[a, b] - gain[a, c])
            if left and right:
                total += 1
                agree += int(left == right)
    return agree, total
