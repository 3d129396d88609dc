"""SNIP: prune once before training, by each weight's effect on the loss.

Source: Lee et al., SNIP, ICLR 2019, Eq. 6: score = |g_j(w; D)| / Σ_k |g_k(w; D)| with
g = ∂L/∂mask at mask = 1. The multitask loss is the one training minimises, Σ λ_t L_t. Several
batches count as one large batch: their gradients are summed before the absolute value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemtl.methods.base import StepState
from sparsemtl.methods.masked import MaskConfig, MaskMethod
from sparsemtl.methods.scores import INITS, gradients, scoring

LOSSES = ("weighted", "unweighted")
SUMS = ("signed", "absolute")


@dataclass(frozen=True)
class SNIPConfig(MaskConfig):
    """What the scores are computed on."""

    batches: int = 1  # mini-batches of the run's size; the paper uses one
    init: str = "xavier"  # weights while scoring: xavier (paper: variance scaling), own
    loss: str = "weighted"  # Σ λ_t L_t, or unweighted: Σ L_t
    sums: str = "signed"  # over batches, before the absolute value; absolute: after it (DiSparse)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("batches")
        self.check_choice("init", INITS)
        self.check_choice("loss", LOSSES)
        self.check_choice("sums", SUMS)


class SNIP(MaskMethod):
    """|w · ∂L/∂w|, once, before the first step."""

    name = "snip"

    def on_start(self, state: StepState) -> None:
        flat = [w for group in self.weights for w in group]
        with scoring(state.model, flat, self.config.init, state.seed):
            total = self._scores(state, flat)
        rest = iter(total)
        self.prune([[next(rest) for _ in group] for group in self.weights])

    def _scores(self, state: StepState, weights: Sequence[Tensor]) -> list[Tensor]:
        config = self.config
        total = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
        for batch in state.scoring_batches(config.batches):
            losses = state.forward(batch)
            scale = {t: state.loss_weight(t) if config.loss == "weighted" else 1.0 for t in losses}
            loss = torch.stack([losses[t] * scale[t] for t in losses]).sum()
            found = gradients(loss, weights)
            state.average(found)
            for part, g, w in zip(total, found, weights, strict=True):
                product = (g * w.detach()).float()
                part.add_(product.abs() if config.sums == "absolute" else product)
        total = [part.abs_() for part in total]
        scale_all = torch.stack([part.sum(dtype=torch.float64) for part in total]).sum()
        return [part.div_(scale_all.clamp_min(1e-30).to(part)) for part in total]
