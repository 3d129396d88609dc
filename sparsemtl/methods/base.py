"""What a pruning method is: it decides what is pruned and when; the loop does the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer


class StepState(Protocol):
    """What a method sees of the training state."""

    step: int  # finished optimizer steps
    model: nn.Module
    optimizer: Optimizer


class Method:
    """Base of the methods; this one prunes nothing.

    Order of calls: prepare, then per step on_backward (gradients are complete, the optimizer has
    not stepped) and on_step (it has; `state.step` counts it), finally finalize.
    """

    name = "dense"
    sparsity_target = 0.0
    default_weighting = "fixed"

    def prepare(self, model: nn.Module, steps: int, batches: Iterable[Any] = ()) -> None:
        """Once, before the optimizer is built.   batches: training batches, for scores."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups: everything that learns through the main optimizer."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def on_backward(self, state: StepState) -> None:
        """After backward, before clipping and the optimizer step."""

    def on_step(self, state: StepState) -> None:
        """After the optimizer step."""

    def finalize(self, model: nn.Module) -> nn.Module:
        """A plain torch model, ready to save."""
        return model

    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Numbers for the log of this step: thresholds, phase."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{self.name}: Expected an empty method state, got {sorted(state)}")
