"""How alike two tasks' dominant sub-networks are in one layer: EPI-Sim, IoU, CSS and MCSS.

T tasks, n weights of the layer. Every function returns [T, T] float64, symmetric, and passes over
the weights in pieces, so it needs no second copy of a layer. Source: Meta-Sparse (the poster).

A layer in which neither task keeps a weight has no defined IoU or MCSS. `empty` says what it
counts: "equal" (the default): 1, as EPI-Sim has it, since two empty sub-networks are the same one;
"released": what the released code computes, NaN for IoU and 0 for MCSS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsemtl.errors import unknown_choice

METRICS = ("epi", "iou", "css", "mcss")
EMPTY = ("equal", "released")
PIECE = 1 << 20  # weights at a time
EPS_COUNT = 1e-9  # the released code's, in EPI-Sim's denominator


def epi(kept: Tensor) -> Tensor:
    """EPI-Sim, 1 - |n_a - n_b| / (n_a + n_b).   kept: [T], how many weights each task keeps"""
    kept = kept.double()
    a, b = kept[:, None], kept[None, :]
    return 1.0 - (a - b).abs() / (a + b).clamp_min(EPS_COUNT)


def iou(masks: Sequence[Tensor], empty: str = "equal") -> Tensor:
    """|A ∧ B| / |A ∨ B|.   masks: T bool tensors of one layer's shape"""
    _check_empty(empty)
    both = _gram(masks)
    size = both.diagonal()
    union = size[:, None] + size[None, :] - both
    nothing = 1.0 if empty == "equal" else float("nan")
    return torch.where(union > 0, both / union.clamp_min(1.0), nothing)


def css(saliencies: Sequence[Tensor]) -> Tensor:
    """Cosine of the saliencies.   saliencies: T tensors ≥ 0 of one layer's shape"""
    return _cosine(_gram(saliencies), 1.0)


def mcss(saliencies: Sequence[Tensor], masks: Sequence[Tensor], empty: str = "equal") -> Tensor:
    """Cosine of mask · saliency.   saliencies, masks: T tensors of one layer's shape"""
    _check_empty(empty)
    return _cosine(_gram(saliencies, masks), 1.0 if empty == "equal" else 0.0)


def joint_iou(masks: Sequence[Tensor]) -> float:
    """|∧ A_t| / |∨ A_t| over all tasks, DiSparse's analysis; 1 where no task keeps a weight."""
    every, some = masks[0].clone(), masks[0].clone()
    for mask in masks[1:]:
        every &= mask
        some |= mask
    union = int(some.sum())
    return int(every.sum()) / union if union else 1.0


def _gram(rows: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> Tensor:
    """Inner products of all pairs, in float64, piece by piece.   returns: [T, T]"""
    flat = [row.reshape(-1) for row in rows]
    chosen = None if masks is None else [mask.reshape(-1) for mask in masks]
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
    for start in range(0, flat[0].numel(), PIECE):
        piece = slice(start, start + PIECE)
        part = torch.stack([row[piece] for row in flat]).double()  # [T, PIECE]
        if chosen is not None:
            part *= torch.stack([mask[piece] for mask in chosen])
        total += part @ part.T
    return total.cpu()


def _cosine(gram: Tensor, nothing: float) -> Tensor:
    """Cosines from inner products; two zero vectors give `nothing`, one gives 0."""
    norm = gram.diagonal().sqrt()
    product = norm[:, None] * norm[None, :]
    cosine = (gram / product.where(product > 0, torch.ones_like(product))).clamp(-1.0, 1.0)
    cosine = cosine.where(product > 0, torch.zeros_like(cosine))
    both_zero = (norm == 0)[:, None] & (norm == 0)[None, :]
    return cosine.where(~both_zero, torch.full_like(cosine, nothing))


def _check_empty(empty: str) -> None:
    if empty not in EMPTY:
        raise ValueError(f"similarity metrics: {unknown_choice('empty', empty, EMPTY)}")
