"""AdapMTL: one learnable soft threshold per component, co-trained with the weights.

Source: Xiang et al., AdapMTL, ACM MM 2024, Eq. 2-5 (thresholds); Eq. 6, the task weighting, is
`training/weighting.py`. What is ours: the controller that reaches the requested sparsity exactly,
and the joint normalisation of the thresholds' gradients (docs/fidelity.md compares both).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsemtl.methods.base import Method, StepState
from sparsemtl.sparsity.allocation import check_possible
from sparsemtl.sparsity.controller import Controller, ControllerConfig
from sparsemtl.sparsity.finalize import finalize
from sparsemtl.sparsity.mask import check_sparsity
from sparsemtl.sparsity.sparsify import GROUPINGS, Sparsity, sparsify
from sparsemtl.sparsity.split import SPLITS, JointSplit, pruning_slopes
from sparsemtl.sparsity.structure import parse_structure

SHORTEST = 100  # steps of a ramp below which thresholds travel less


@dataclass(frozen=True)
class AdapMTLConfig:
    """AdapMTL's own choices; the exact controller's stand in `controller`."""

    sparsity: float = 0.9  # fraction of zeros over all components, met exactly
    grouping: str = "component"  # who shares a threshold: component, one, two, layer (STR)
    theta_init: float = -20.0  # θ before training; the released code's default is -30.5
    structure: str = "element"  # what lives or dies together: see sparsity/structure.py
    split: str = "joint"  # how differences are learned: "joint" (split.py), "adam" (paper)
    travel: float = 2.0  # joint: how far a θ may move apart over the ramp, in units of log α
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    def __post_init__(self) -> None:
        check_sparsity(type(self).__name__, "sparsity", self.sparsity)
        n_of_m = parse_structure(self.structure).n_of_m
        if n_of_m is not None and self.sparsity < 1.0 - n_of_m[0] / n_of_m[1]:
            raise ValueError(
                f"AdapMTLConfig: Expected sparsity ≥ {1.0 - n_of_m[0] / n_of_m[1]:g} with "
                f"{self.structure}, got {self.sparsity}"
            )
        for name, value, choices in (
            ("grouping", self.grouping, GROUPINGS),
            ("split", self.split, SPLITS),
        ):
            if value not in choices:
                raise ValueError(
                    f"AdapMTLConfig: Expected {name} in {list(choices)}, got {value!r}"
                )
        if not math.isfinite(self.theta_init):
            raise ValueError(f"AdapMTLConfig: Expected finite theta_init, got {self.theta_init}")
        if not self.travel >= 0.0:
            raise ValueError(f"AdapMTLConfig: Expected travel >= 0, got {self.travel}")


class AdapMTL(Method):
    """Learned thresholds, exact target, then a fixed mask."""

    name = "adapmtl"
    default_weighting = "adaptive"

    def __init__(self, config: AdapMTLConfig, components: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.component_map = components
        self.sparsity_target = config.sparsity
        self._slopes: torch.Tensor | None = None

    def prepare(self, model: nn.Module, steps: int, batches: Iterable[Any] = ()) -> None:
        config = self.config
        sparsify(
            model,
            self.component_map,
            grouping=config.grouping,
            theta_init=config.theta_init,
            structure=config.structure,
        )
        self.sparsity = _sparsity_of(model)
        groups = range(len(self.sparsity.groups))
        shapes = [tuple(w.shape) for g in groups for w in self.sparsity.weights(g)]
        check_possible(self.name, shapes, config.sparsity, self.sparsity.structure)
        self.controller = Controller(config.controller, self.sparsity, config.sparsity, steps)
        self.joint = config.split == "joint" and config.controller.control == "exact"
        self.split = JointSplit(len(self.sparsity.groups))
        ramp = self.controller.end - self.controller.start
        # A short ramp has too few noisy gradients to spend all of the travel on.
        self.rate = config.travel / max(SHORTEST, ramp)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """θ is decayed and stepped like a weight (paper); the joint split moves it itself."""
        weights = [p for p in model.parameters() if p is not self.sparsity.theta]
        groups: list[dict[str, Any]] = [{"params": weights}]
        if not self.joint:
            groups.append({"params": [self.sparsity.theta]})
        return groups

    def on_step(self, state: StepState) -> None:
        theta, controller = self.sparsity.theta, self.controller
        if self.joint and controller.steering and theta.grad is not None:
            if self._slopes is None or controller.solves_at(state.step):
                self._slopes = pruning_slopes(controller.histograms(state.step), theta)
            self.split.step(theta, theta.grad, self._slopes, self.rate)
        theta.grad = None
        controller.on_step(state.step)

    def finalize(self, model: nn.Module) -> nn.Module:
        return finalize(model)

    def describe(self, model: nn.Module) -> dict[str, Any]:
        alpha = self.sparsity.alpha.detach().tolist()
        return {
            "alpha": dict(zip(self.sparsity.group_names, alpha, strict=True)),
            "frozen": self.sparsity.frozen,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "sparsity": self.sparsity.resume_state(),
            "controller": self.controller.state_dict(),
            "split": self.split.state_dict(),
            "slopes": self._slopes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sparsity.load_resume_state(state["sparsity"])
        self.controller.load_state_dict(state["controller"])
        self.split.load_state_dict(state["split"])
        self._slopes = state["slopes"]


def _sparsity_of(model: nn.Module) -> Sparsity:
    assert isinstance(model.sparsity, Sparsity)
    return model.sparsity
