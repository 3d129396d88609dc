"""Counts: how sparse is what, exactly (`sparsity_report`) or fast (`MagnitudeHistogram`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsemtl.models.component import Component
from sparsemtl.sparsity.layers import SparseLayer, unique_layers
from sparsemtl.sparsity.sparsify import Sparsity
from sparsemtl.sparsity.structure import ELEMENT, Structure

SHIFT = 15  # keeps a float's exponent and 8 bits of its mantissa: bins 0.4 % wide
BINS = 0x7F800000 >> SHIFT


@dataclass(frozen=True)
class MagnitudeHistogram:
    """Counts of |w| in bins of equal relative width, for solving thresholds without a sort."""

    cumulative: Tensor  # [BINS + 2] float64; cumulative[i] = weights in bins below i
    numel: int

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], limit: int = 1 << 20, structure: Structure = ELEMENT
    ) -> MagnitudeHistogram:
        """Histogram of all the weights; above `limit` weights, of every n-th one, scaled up.

        With a structure, a weight counts with its group's magnitude, and none is left out.
        """
        if structure != ELEMENT:
            return cls._of_groups(weights, structure)
        numel = sum(w.numel() for w in weights)
        stride = max(1, -(-numel // limit))
        counts = torch.zeros(BINS + 1, dtype=torch.float64)
        for weight in weights:
            flat = weight.detach().reshape(-1)[::stride].float()
            bits = (flat.view(torch.int32) & 0x7FFFFFFF) >> SHIFT
            found = torch.bincount(bits.clamp_max_(BINS), minlength=BINS + 1)
            counts += found.double().cpu()
        cumulative = torch.zeros(BINS + 2, dtype=torch.float64)
        torch.cumsum(counts, 0, out=cumulative[1:])
        return cls(cumulative * (numel / max(1.0, float(cumulative[-1]))), numel)

    @classmethod
    def _of_groups(cls, weights: Sequence[Tensor], structure: Structure) -> MagnitudeHistogram:
        counts = torch.zeros(BINS + 1, dtype=torch.float64)
        for weight in weights:
            magnitudes = structure.magnitudes(weight).reshape(-1).float()
            bits = (magnitudes.view(torch.int32) & 0x7FFFFFFF) >> SHIFT
            sizes = structure.sizes(weight.shape).reshape(-1).to(bits.device, torch.float64)
            counts += torch.bincount(bits.clamp_max_(BINS), sizes, BINS + 1).cpu()
        cumulative = torch.zeros(BINS + 2, dtype=torch.float64)
        torch.cumsum(counts, 0, out=cumulative[1:])
        return cls(cumulative, sum(w.numel() for w in weights))

    def count_below(self, alpha: float) -> float:
        """About how many weights have |w| ≤ α (linear within a bin)."""
        bits = int(torch.tensor(max(alpha, 0.0), dtype=torch.float32).view(torch.int32))
        bin_, rest = bits >> SHIFT, (bits & ((1 << SHIFT) - 1)) / (1 << SHIFT)
        if bin_ >= BINS:
            return float(self.numel)
        below, upto = self.cumulative[bin_].item(), self.cumulative[bin_ + 1].item()
        return below + (upto - below) * rest


def count_dead(sparsity: Sparsity) -> dict[str, tuple[int, int]]:
    """Component → (dead weights, weights), counted without forming S(W, α)."""
    counts = {}
    with torch.no_grad():
        for name, component in sparsity.components.items():
            dead = total = 0
            for _, module in unique_layers(component):
                assert isinstance(module, SparseLayer)
                assert module.slot is not None
                dead += sparsity.dead_count(module.slot.group, module.slot.place)
                total += module.weight.numel()
            counts[name] = (dead, total)
    return counts


def overall_sparsity(counts: Mapping[str, tuple[int, int]]) -> float:
    """Dead weights over weights, of all components together."""
    return sum(d for d, _ in counts.values()) / max(1, sum(n for _, n in counts.values()))


@dataclass(frozen=True)
class SparsityReport:
    """Zeros of the prunable weights. Biases and batch norm are in `all_parameters` only."""

    overall: float  # zeros / weights, over all components
    components: dict[str, float]
    zeros: int
    weights: int
    component_zeros: dict[str, int]
    component_weights: dict[str, int]
    all_parameters: float  # zeros among the prunable weights / every parameter of the model
    layers: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sparsity_report(model: nn.Module, components: Mapping[str, Component]) -> SparsityReport:
    """Count exact zeros of the effective weights of each component.

    model:      a sparsified one is counted through its thresholds and masks, a plain one as it is
    components: of this model or of one of the same layout: layers are found by their names
    raises:     ValueError for a layer that the model has not
    """
    sparsity = getattr(model, "sparsity", None)
    rows: list[tuple[str, str, Tensor]]
    if isinstance(sparsity, Sparsity):
        rows = list(sparsity.effective_weights())
    else:
        modules = dict(model.named_modules())
        names = [(n, layer) for n, c in components.items() for layer, _ in unique_layers(c)]
        lost = [layer for _, layer in names if layer not in modules]
        if lost:
            raise ValueError(
                f"sparsity_report: Expected components of this model, got unknown layers {lost[:3]}"
            )
        rows = [(n, layer, modules[layer].weight.detach()) for n, layer in names]  # type: ignore[operator, union-attr]
    zeros = dict.fromkeys(components, 0)
    sizes = dict.fromkeys(components, 0)
    layers = {}
    for name, layer, value in rows:
        dead = int((value == 0).sum())
        zeros[name] += dead
        sizes[name] += value.numel()
        layers[layer] = dead / max(1, value.numel())
    everything = sum(
        p.numel() for n, p in model.named_parameters() if not n.startswith("sparsity.")
    )
    dead, total = sum(zeros.values()), sum(sizes.values())
    return SparsityReport(
        overall=dead / max(1, total),
        components={n: zeros[n] / max(1, sizes[n]) for n in components},
        zeros=dead,
        weights=total,
        component_zeros=zeros,
        component_weights=sizes,
        all_parameters=dead / max(1, everything),
        layers=layers,
    )
