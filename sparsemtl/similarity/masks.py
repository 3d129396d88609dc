"""Exact top-k cuts over many layers, found layer by layer.

A cut says which scores of a list of layers are kept without joining the layers: everything above
`value`, and the first `ties` of those equal to it, in layer and then flat order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOWER_BITS = 15  # left to the second pass: the first counts 2^16 bins of the floats' upper bits
KEEP_RULES = ("exact", "disparse-nyuv2")
# DiSparse's hand-tuned keep ratios of its two-task NYUv2 setup, which Meta-Sparse also uses.
DISPARSE_NYUV2 = {0.9: 0.08, 0.7: 0.257, 0.5: 0.46, 0.3: 0.675}


@dataclass(frozen=True)
class Cut:
    """Where the kept scores end."""

    value: float
    ties: int


def keep_ratio(sparsity: float, rule: str = "exact") -> float:
    """The fraction of weights kept at a sparsity.

    rule:   "exact": 1 - sparsity; "disparse-nyuv2": the released table, which exists for 0.3, 0.5,
            0.7 and 0.9 and is 1 - sparsity elsewhere
    raises: ValueError unless 0 < sparsity < 1, or for another rule
    """
    if rule not in KEEP_RULES:
        raise ValueError(f"keep_ratio: Expected rule in {list(KEEP_RULES)}, got {rule!r}")
    if not 0.0 < sparsity < 1.0:
        raise ValueError(f"keep_ratio: Expected sparsity in (0, 1), got {sparsity}")
    if rule == "disparse-nyuv2" and sparsity in DISPARSE_NYUV2:
        return DISPARSE_NYUV2[sparsity]
    return round(1.0 - sparsity, 12)


def kept_count(numel: int, keep: float) -> int:
    """int(numel · keep), as the releases count, of the decimal product: 100 · 0.29 is 29."""
    return int(round(numel * keep, 6))


def find_cut(layers: Sequence[Tensor], kept: int) -> Cut:
    """The cut that keeps exactly the `kept` largest of all scores.

    layers: float32, ≥ 0, any shapes; the bit patterns of such floats order like their values, so
            one pass counts them by their upper bits and a second by the rest within one bin
    raises: ValueError if there are fewer scores than `kept`, or on NaN
    """
    total = sum(layer.numel() for layer in layers)
    if not 0 <= kept <= total:
        raise ValueError(f"find_cut: Expected kept in [0, {total}], got {kept}")
    if any(bool(layer.isnan().any()) for layer in layers):
        raise ValueError("find_cut: Expected scores without NaN, got NaN")
    if kept == 0:
        return Cut(float("inf"), 0)
    upper = _count((_bits(layer) >> LOWER_BITS for layer in layers), 1 << 16)
    bin_, above = _bin_of(upper, kept)
    inside = (b[(b >> LOWER_BITS) == bin_] & ((1 << LOWER_BITS) - 1) for b in map(_bits, layers))
    low, nearer = _bin_of(_count(inside, 1 << LOWER_BITS), kept - above)
    value = torch.tensor((bin_ << LOWER_BITS) | low, dtype=torch.int32).view(torch.float32)
    return Cut(float(value), kept - above - nearer)


def cut_masks(layers: Sequence[Tensor], cut: Cut) -> Iterator[Tensor]:
    """The bool mask of each layer, one after the other; `layers` may be the first of those cut."""
    left = cut.ties
    for layer in layers:
        mask = layer > cut.value
        if left > 0:
            tied = (layer == cut.value).reshape(-1).nonzero().squeeze(1)[:left]
            mask.view(-1)[tied] = True
            left -= len(tied)
        yield mask


def _bits(layer: Tensor) -> Tensor:
    return layer.detach().reshape(-1).contiguous().view(torch.int32)


def _count(parts: Iterable[Tensor], bins: int) -> Tensor:
    counts = torch.zeros(bins, dtype=torch.int64)
    for part in parts:
        counts += torch.bincount(part.cpu(), minlength=bins)
    return counts


def _bin_of(counts: Tensor, kept: int) -> tuple[int, int]:
    """The bin that holds the `kept`-th largest, and how many lie in higher bins."""
    from_top = torch.cumsum(counts.flip(0), 0)
    place = int(torch.searchsorted(from_top, kept))
    above = int(from_top[place - 1]) if place > 0 else 0
    return len(counts) - 1 - place, above
