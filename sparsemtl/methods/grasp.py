"""GraSP: prune once before training, keeping what preserves the flow of gradients.

Source: Wang et al., GraSP, ICLR 2020, Eq. 8: S(-w) = -w ⊙ (H g); the weights with the highest
scores are removed. H g comes from a second backward pass through the gradient. Scores are shifted
to be positive and reversed, which keeps their order; there is no softmax temperature, as most
tasks have no logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemtl.methods.base import StepState
from sparsemtl.methods.masked import MaskConfig, MaskMethod
from sparsemtl.methods.scores import INITS, gradients, scoring


@dataclass(frozen=True)
class GraSPConfig(MaskConfig):
    """What the scores are computed on."""

    batches: int = 1  # mini-batches of the run's size
    init: str = "xavier"  # weights while scoring: xavier, own

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("batches")
        self.check_choice("init", INITS)


class GraSP(MaskMethod):
    """w · (H g), once, before the first step."""

    name = "grasp"

    def on_start(self, state: StepState) -> None:
        flat = [w for group in self.weights for w in group]
        with scoring(state.model, flat, self.config.init, state.seed):
            kept = self._scores(state, flat)
        least = min(float(score.min()) for score in kept)
        rest = iter([(score - least).float() for score in kept])
        self.prune([[next(rest) for _ in group] for group in self.weights])

    def _scores(self, state: StepState, weights: Sequence[Tensor]) -> list[Tensor]:
        """w · (H g) in float64: the higher, the better to keep."""
        total = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
        for batch in state.scoring_batches(self.config.batches):
            losses = state.forward(batch)
            loss = torch.stack([losses[t] * state.loss_weight(t) for t in losses]).sum()
            first = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
            used = [g for g in first if g is not None]
            flow = torch.stack([(g * g.detach()).sum() for g in used]).sum()
            found = gradients(flow, weights)  # H g
            state.average(found)
            for part, hg, w in zip(total, found, weights, strict=True):
                part.add_(hg.double() * w.detach().double())
        return total
