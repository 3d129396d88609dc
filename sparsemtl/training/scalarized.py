"""Weightings by name through torchjd's scalarizers.

A scalarizer turns the weighted losses into one value S; minimising S moves the network along
Σ_t (∂S/∂L_t) ∇L_t, so its partial derivatives are the factors. Sources: see torchjd.scalarization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sparsemtl.training.weighting import WeightingConfig

SCALARIZERS: dict[str, str] = {  # name → class of torchjd
    "dwa": "DWA",  # two epochs' losses compared, temperature 2 (MTAN)
    "uncertainty": "UW",  # learned log-variances (Kendall et al.)
    "imtl-l": "IMTLL",  # learned scales
    "geometric-mean": "GeometricMean",
    "random": "Random",  # RLW
}
_DWA_STATE = ("_loss_sum", "_n_batches", "_previous_averages")


class Scalarized:
    """Factors from a scalarizer. What it learns, the run's optimizer steps, without decay."""

    def __init__(
        self,
        config: WeightingConfig,
        tasks: Sequence[str],
        loss_weights: Mapping[str, float],
        epoch: int,
    ) -> None:
        import torchjd.scalarization as scalarizers

        self.tasks, self.epoch, self.seen = tuple(tasks), epoch, 0
        self.loss_weights = [float(loss_weights.get(task, 1.0)) for task in tasks]
        kind = getattr(scalarizers, SCALARIZERS[config.name])
        learns = config.name in ("uncertainty", "imtl-l")
        self.rule: nn.Module = kind(len(tasks)) if learns else kind()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.rule.parameters())

    def __call__(self, losses: Mapping[str, float]) -> dict[str, float]:
        """The factors for this step, and the gradients of what the scalarizer learns."""
        self.seen += 1
        values = torch.tensor(
            [losses[t] * w for t, w in zip(self.tasks, self.loss_weights, strict=True)],
            requires_grad=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seen)  # a random rule draws alike in every process
            self.rule(values).backward()
        if hasattr(self.rule, "step") and self.seen % self.epoch == 0:
            self.rule.step()  # type: ignore[operator]  # DWA closes an epoch
        assert values.grad is not None
        return dict(zip(self.tasks, values.grad.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        own = vars(self.rule)
        return {
            "seen": self.seen,
            "learned": self.rule.state_dict(),
            "history": {k: own[k] for k in _DWA_STATE if k in own},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]
        self.rule.load_state_dict(state["learned"])
        for name, value in state["history"].items():
            setattr(self.rule, name, value)
