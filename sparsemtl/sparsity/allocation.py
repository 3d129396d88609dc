"""How a budget is spread over the layers, and masks that meet it exactly.

global    the best-scored weights wherever they are
uniform   the same density in each layer
erk       density ∝ (Σ shape / Π shape)^power; layers that would pass 1 stay dense
sources: SET (Mocanu et al., 2018) and RigL (Evci et al., 2020), Appendix B, for ERK.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, prod

import torch
from torch import Tensor

from sparsemtl.errors import unknown_choice
from sparsemtl.sparsity.mask import kept_count
from sparsemtl.sparsity.structure import Structure, n_of_m_mask

ALLOCATIONS = ("global", "uniform", "erk")
TOLERANCE = 1e-3  # a requested sparsity is met within this, or refused

Scores = Sequence[Sequence[Tensor]]


def erk_densities(
    shapes: Sequence[tuple[int, ...]], density: float, power: float = 1.0
) -> list[float]:
    """Density of each layer so that all together keep a fraction `density`.

    shapes: of the weights, [K, C, h, w] or [K, C]
    raises: ValueError for a density outside (0, 1]
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"erk_densities: Expected density in (0, 1], got {density}")
    sizes = [prod(shape) for shape in shapes]
    raw = [(sum(shape) / prod(shape)) ** power for shape in shapes]
    dense: set[int] = set()
    while True:
        free = [i for i in range(len(sizes)) if i not in dense]
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        scale = budget / sum(raw[i] * sizes[i] for i in free) if free else 0.0
        over = [i for i in free if scale * raw[i] > 1.0]
        if not over:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(sizes))]
        dense.update(over)


def layer_budgets(
    shapes: Sequence[tuple[int, ...]], kept: int, allocation: str, power: float = 1.0
) -> list[int]:
    """Weights that each layer keeps; they sum to exactly `kept`.

    allocation: "uniform" or "erk"
    """
    sizes = [prod(shape) for shape in shapes]
    density = kept / sum(sizes)
    if allocation == "uniform":
        shares = [density] * len(sizes)
    elif allocation == "erk":
        shares = erk_densities(shapes, density, power) if kept else [0.0] * len(sizes)
    else:
        raise ValueError(unknown_choice("allocation", allocation, ("uniform", "erk")))
    exact = [Fraction(share) * size for share, size in zip(shares, sizes, strict=True)]
    budgets = [min(int(value), size) for value, size in zip(exact, sizes, strict=True)]
    # Largest remainders first, so that no layer is off by more than the rounding asks for.
    order = sorted(range(len(sizes)), key=lambda i: (budgets[i] - exact[i], i))
    while (short := kept - sum(budgets)) > 0:
        for i in [j for j in order if budgets[j] < sizes[j]][:short]:
            budgets[i] += 1
    for i in reversed(order):  # float densities may sum to a hair above
        budgets[i] -= min(budgets[i], max(0, sum(budgets) - kept))
    return budgets


def allocated_masks(
    who: str,
    scores: Scores,
    sparsity: float,
    structure: Structure,
    allocation: str = "global",
    power: float = 1.0,
    exact: bool = True,
) -> list[list[Tensor]]:
    """Masks that keep the best-scored weights at exactly `sparsity`.

    scores:  per component, per layer: like the weight, ≥ 0
    exact:   False: come as near as the structure can, for a round before the last
    returns: bool masks in the same nesting; with whole groups the count may miss the target by
             less than a group, never by more than 0.1 % of all weights
    raises:  ValueError, with the nearest possible sparsity, if the structure cannot reach it
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(f"{who}: {unknown_choice('allocation', allocation, ALLOCATIONS)}")
    layers = [layer for group in scores for layer in group]
    numel = sum(layer.numel() for layer in layers)
    kept = kept_count(numel, sparsity)
    if kept == 0:
        raise ValueError(
            f"{who}: Expected a sparsity that keeps at least one of {numel} weights, got "
            f"{sparsity}; the nearest is {1.0 - 1.0 / numel:.6g}"
        )
    if exact:
        check_room(who, scores, sparsity, structure)
    rooms = [room(layer, structure) for layer in layers]
    kept = min(kept, sum(rooms))
    if allocation == "global":
        masks = structure.masks(scores, kept)[0]
    else:
        shapes = [tuple(layer.shape) for layer in layers]
        budgets = within_rooms(layer_budgets(shapes, kept, allocation, power), rooms)
        masks = masks_by_layer(scores, budgets, structure)
    if exact:
        check_reached(who, masks, sparsity, structure)
    return masks


def within_rooms(budgets: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """Cap each layer's budget at its room; what is cut goes to the others in proportion to theirs.

    returns: as many in all, while the rooms hold so many
    """
    found = [min(b, r) for b, r in zip(budgets, rooms, strict=True)]
    target = min(sum(budgets), sum(rooms))
    while (over := target - sum(found)) > 0:
        free = [i for i in range(len(found)) if found[i] < rooms[i]]
        total = sum(found[i] for i in free)
        for i in free:
            share = over * found[i] // total if total else over
            found[i] += min(max(1, share), rooms[i] - found[i], target - sum(found))
    return found


def masks_by_layer(
    scores: Scores, budgets: Sequence[int], structure: Structure
) -> list[list[Tensor]]:
    """The best of each layer. What whole groups leave of a layer's budget goes to the next ones."""
    left, carried = list(budgets), 0
    masks: list[list[Tensor]] = []
    for group in scores:
        masks.append([])
        for layer in group:
            asked = min(left.pop(0) + carried, room(layer, structure))
            mask = structure.masks([[layer]], asked)[0][0][0]
            carried += budgets[len(budgets) - len(left) - 1] - int(mask.sum())
            masks[-1].append(mask)
    return masks


def room(scores: Tensor, structure: Structure) -> int:
    """How many weights of one layer may live: all, but for N:M, where a score of 0 is dead too."""
    if structure.n_of_m is None:
        return scores.numel()
    return int((n_of_m_mask(scores, *structure.n_of_m) & (scores > 0)).sum())


def check_possible(
    who: str, shapes: Sequence[tuple[int, ...]], sparsity: float, structure: Structure
) -> None:
    """raises ValueError, with the nearest, for a budget that no scores at all could meet.

    shapes: of all prunable weights. What scores decide too, `allocated_masks` says.
    """
    numel = sum(prod(shape) for shape in shapes)
    kept = kept_count(numel, sparsity)
    if structure.n_of_m is not None:
        n, m = structure.n_of_m
        able = sum(
            prod(shape) // shape[1] * (shape[1] // m * n + min(shape[1] % m, n)) for shape in shapes
        )
        if kept > able:
            raise ValueError(_no_room(who, structure, sparsity, able, numel, "weights"))
    elif structure.grouped:
        unit = gcd(*(int(size) for shape in shapes for size in structure.sizes(shape).unique()))
        near = min(numel, max(unit, round(kept / unit) * unit))  # numel is a multiple too
        if abs(near - kept) > TOLERANCE * numel:
            raise ValueError(_no_group(who, structure, sparsity, 1.0 - near / numel))


def _no_room(
    who: str, structure: Structure, sparsity: float, able: int, numel: int, what: str
) -> str:
    return (
        f"{who}: Expected a sparsity that {structure} can reach, got {sparsity}: it keeps at most "
        f"{able} of {numel} {what}; the nearest is {1.0 - able / numel:.4f}"
    )


def _no_group(who: str, structure: Structure, sparsity: float, nearest: float) -> str:
    return (
        f"{who}: Expected a sparsity that whole groups of structure {structure} can reach within "
        f"0.1 %, got {sparsity}; the nearest is {nearest:.4f}"
    )


def check_room(who: str, scores: Scores, sparsity: float, structure: Structure) -> None:
    """raises ValueError if N:M leaves fewer weights than `sparsity` asks to keep."""
    if structure.n_of_m is None:
        return
    numel = sum(layer.numel() for group in scores for layer in group)
    able = sum(room(layer, structure) for group in scores for layer in group)
    if kept_count(numel, sparsity) > able:
        what = "weights that have a score"
        raise ValueError(_no_room(who, structure, sparsity, able, numel, what))


def check_reached(
    who: str, masks: Sequence[Sequence[Tensor]], sparsity: float, structure: Structure
) -> None:
    """raises ValueError unless the masks' sparsity is within 0.1 % of the requested one."""
    numel = sum(mask.numel() for group in masks for mask in group)
    kept = sum(int(mask.sum()) for group in masks for mask in group)
    asked = kept_count(numel, sparsity)
    if abs(kept - asked) > TOLERANCE * numel:
        more = kept + _smallest_dead(masks, structure)
        kept = more if abs(more - asked) < abs(kept - asked) else kept
        raise ValueError(_no_group(who, structure, sparsity, 1.0 - kept / numel))


def _smallest_dead(masks: Sequence[Sequence[Tensor]], structure: Structure) -> int:
    """Weights of the smallest group that the masks leave out; 0 if none."""
    sizes = [
        structure.sizes(mask.shape)[(structure.scores(mask.float()) == 0).cpu()]
        for group in masks
        for mask in group
    ]
    return min((int(found.min()) for found in sizes if found.numel()), default=0)


def random_scores(weights: Scores, seed: int) -> list[list[Tensor]]:
    """Scores in (0, 1] that depend on `seed` and the shapes alone: random masks."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (1.0 - torch.rand(w.shape, generator=generator)).to(w.device)  # 1 - [0, 1): never 0
            for w in group
        ]
        for group in weights
    ]
