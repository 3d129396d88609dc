"""What a pruning method is: it decides what is pruned and when; the loop does the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer


class StepState(Protocol):
    """What a method sees of a run. `OwnLoop` is one for a training loop of your own."""

    step: int  # finished optimizer steps
    model: nn.Module
    optimizer: Optimizer
    batch: Any  # of the step under way

    @property
    def seed(self) -> int:
        """Of the run: what a method draws must depend on it alone."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every training sample is seen once."""

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Per-task losses of one batch, scalars with gradient."""

    def loss_weight(self, task: str) -> float:
        """λ of one task."""

    def scoring_batches(self, count: int) -> Iterator[Any]:
        """The first `count` training batches."""

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes of the run."""


class Method:
    """Base of the methods; this one prunes nothing.

    Order of calls: adapt and prepare; on_start before the first step of a new run (never when
    resuming); per step on_forward (the batch is known, nothing is computed), on_backward (gradients
    are complete, the optimizer has not stepped) and on_step (it has; `state.step` counts it);
    finally finalize. What happens at a step follows from `state.step`, or stands in `state_dict`.
    """

    name = "dense"
    sparsity_target = 0.0
    default_weighting = "fixed"

    def adapt(self, model: nn.Module, tasks: Sequence[str]) -> nn.Module:
        """The network to train in place of `model`, for methods that need another."""
        return model

    def prepare(self, model: nn.Module, steps: int, batches: Iterable[Any] = ()) -> None:
        """Once, before the optimizer is built."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups: everything that learns through the main optimizer."""
        return [{"params": [p for p in model.parameters() if p.requires_grad]}]

    def schedule_step(self, step: int) -> float:
        """Where the learning-rate schedule stands at `step`, in steps of the whole run."""
        return step

    def on_start(self, state: StepState) -> None:
        """Before the first step of a new run: scores on data, masks from the start."""

    def on_forward(self, state: StepState) -> None:
        """Before a step computes anything."""

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

    def before_load(self, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Give model and optimizer the shapes that they had when `state` was saved."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{self.name}: Expected an empty method state, got {sorted(state)}")


@dataclass
class OwnLoop:
    """The `StepState` of a training loop of your own, in one process.

    losses:  batch → task → scalar loss with gradient
    batches: what scores are computed on, for the methods that need some
    """

    model: nn.Module
    optimizer: Optimizer
    losses: Any
    batches: Sequence[Any] = ()
    step: int = 0
    batch: Any = None
    seed: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.batches))

    def forward(self, batch: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.losses(batch)
        return found

    def loss_weight(self, task: str) -> float:
        return 1.0

    def scoring_batches(self, count: int) -> Iterator[Any]:
        if len(self.batches) < count:
            raise ValueError(
                f"OwnLoop: Expected at least {count} batches to score on, got {len(self.batches)}"
            )
        return iter(self.batches[:count])

    def average(self, tensors: Sequence[Tensor]) -> None:
        pass
