"""What the methods with fixed masks share: a budget, a structure, and how masks are put in place.

Until masks are fixed the layers compute with their weights as they are; afterwards pruned weights
are exactly 0 and get no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsemtl.errors import unknown_choice
from sparsemtl.methods.base import Method
from sparsemtl.sparsity.allocation import ALLOCATIONS, allocated_masks, check_possible
from sparsemtl.sparsity.finalize import finalize
from sparsemtl.sparsity.mask import check_sparsity
from sparsemtl.sparsity.sparsify import Sparsity, sparsify
from sparsemtl.sparsity.structure import parse_structure

NO_THRESHOLD = -200.0  # of θ: α = sigmoid(θ) is 0 in float32


@dataclass(frozen=True)
class MaskConfig:
    """What every method with masks has."""

    sparsity: float = 0.9  # fraction of zeros over all components, met exactly
    structure: str = "element"  # element, vector(V), block(BO, BI), channel or N:M

    def __post_init__(self) -> None:
        check_sparsity(type(self).__name__, "sparsity", self.sparsity)
        parse_structure(self.structure)

    def check_choice(self, name: str, choices: Iterable[str]) -> None:
        """raises ValueError unless the field `name` is one of `choices`."""
        value = getattr(self, name)
        if value not in (known := tuple(choices)):
            raise ValueError(f"{type(self).__name__}: {unknown_choice(name, value, known)}")

    def check_share(self, name: str, *, least: float = 0.0, most: float = 1.0) -> None:
        """raises ValueError unless the field `name` lies in [least, most]."""
        value = getattr(self, name)
        if not least <= value <= most:
            raise ValueError(
                f"{type(self).__name__}: Expected {name} in [{least:g}, {most:g}], got {value}"
            )

    def check_count(self, name: str, least: int = 1) -> None:
        """raises ValueError unless the field `name` is a whole number of at least `least`."""
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{type(self).__name__}: Expected {name} >= {least}, got {value!r}")

    def check_allocation(self) -> None:
        self.check_choice("allocation", ALLOCATIONS)  # of the methods that have one


class MaskMethod(Method):
    """Base of the methods with fixed masks; a subclass decides when and by which scores."""

    name = "mask"

    def __init__(self, config: MaskConfig, components: Mapping[str, Any] | None = None) -> None:
        self.config: Any = config
        self.component_map = components
        self.sparsity_target = config.sparsity
        self.structure = parse_structure(config.structure)

    def prepare(self, model: nn.Module, steps: int, batches: Iterable[Any] = ()) -> None:
        sparsify(model, self.component_map, theta_init=NO_THRESHOLD)
        assert isinstance(model.sparsity, Sparsity)
        self.sparsity = model.sparsity
        self.sparsity.theta.requires_grad_(False)
        self.sparsity.open = True
        self.steps = steps
        shapes = [tuple(w.shape) for group in self.weights for w in group]
        check_possible(self.name, shapes, self.sparsity_target, self.structure)

    @property
    def weights(self) -> list[list[nn.Parameter]]:
        """The prunable weights: per component, per layer."""
        return [self.sparsity.weights(g) for g in range(len(self.sparsity.groups))]

    def magnitudes(self) -> list[list[Tensor]]:
        """|w| of every prunable weight."""
        return [[w.detach().abs().float() for w in group] for group in self.weights]

    def prune(
        self,
        scores: list[list[Tensor]],
        sparsity: float | None = None,
        allocation: str = "global",
        power: float = 1.0,
    ) -> None:
        """Keep the best-scored weights at exactly the requested sparsity.

        sparsity: of a round before the last, met as nearly as the structure can
        """
        target = self.sparsity_target if sparsity is None else sparsity
        options = (self.structure, allocation, power, sparsity is None)
        self.sparsity.fix_masks(allocated_masks(self.name, scores, target, *options))

    def finalize(self, model: nn.Module) -> nn.Module:
        return finalize(model)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        return {"frozen": self.sparsity.frozen}

    def state_dict(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity.resume_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sparsity.load_resume_state(state["sparsity"])
        self.sparsity.theta.requires_grad_(False)
        self.sparsity.open = not self.sparsity.frozen


def step_of(share: float, steps: int) -> int:
    """The step at a share of the schedule, at least 1 and at most the last."""
    return max(1, min(steps, round(share * steps)))


def forget_moments(optimizer: Optimizer, weight: Tensor, where: Tensor) -> None:
    """Zero what the optimizer remembers of a weight at `where` (bool, like the weight)."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(where, 0.0)


def masks_of(sparsity: Sparsity) -> list[list[Tensor]]:
    """The masks now in force; all True before any is fixed."""
    if sparsity.masks is not None:
        return sparsity.masks
    groups = range(len(sparsity.groups))
    return [[torch.ones_like(w, dtype=torch.bool) for w in sparsity.weights(g)] for g in groups]
