"""Optimizer and learning-rate schedule of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sparsemtl.sparsity.sparsify import Sparsity
from sparsemtl.training.optim_threshold_adam import ThresholdAdam

SCHEDULES = ("step", "cosine", "constant")
OPTIMIZERS = ("adam", "adamw", "threshold-adam")


@dataclass(frozen=True)
class OptimConfig:
    """Adam with coupled L2 (part of AdapMTL and DiSparse) and its schedule."""

    # "adam": coupled L2, on θ too; "adamw": decoupled (changes AdapMTL);
    # "threshold-adam": adam that writes the next forward's S(W, α) in the same pass
    optimizer: str = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 1e-4
    schedule: str = "step"  # step: × lr_factor every lr_every steps; cosine (to 0); constant
    lr_factor: float = 0.5
    lr_every: int | None = None  # steps; None: a fifth of the schedule (4 000 of 20 000)
    clip_norm: float | None = None  # clip the global gradient norm to this

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if value not in choices:
                raise ValueError(f"OptimConfig: Expected {name} in {list(choices)}, got {value!r}")
        for name in ("lr", "lr_factor"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"OptimConfig: Expected {name} > 0, got {getattr(self, name)}")
        if not 0.0 <= self.weight_decay < math.inf:
            raise ValueError(f"OptimConfig: Expected weight_decay >= 0, got {self.weight_decay}")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ValueError(f"OptimConfig: Expected clip_norm > 0 or None, got {self.clip_norm}")
        if self.lr_every is not None and self.lr_every < 1:
            raise ValueError(f"OptimConfig: Expected lr_every >= 1 or None, got {self.lr_every}")


def build_optimizer(
    config: OptimConfig, groups: list[dict[str, Any]], sparsity: Sparsity | None = None
) -> Optimizer:
    """The optimizer over a method's parameter groups.   sparsity: the model's, if it has one"""
    if config.optimizer == "threshold-adam":
        return ThresholdAdam(
            groups,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            sparsity=sparsity,
        )
    kind = Adam if config.optimizer == "adam" else AdamW
    return kind(
        groups,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        # One fused pass per tensor on both devices; foreach would need a copy of all parameters.
        fused=_fused(groups),
    )


def build_schedule(
    config: OptimConfig,
    optimizer: Optimizer,
    steps: int,
    clock: Callable[[int], float] = float,
) -> LambdaLR:
    """Stepped once per optimizer step.   clock: step → where in the schedule that is"""
    factor = _factor(config, steps)
    return LambdaLR(optimizer, lambda step: factor(clock(step)))


def _factor(config: OptimConfig, steps: int) -> Callable[[float], float]:
    every = config.lr_every if config.lr_every is not None else max(1, steps // 5)
    factors: dict[str, Callable[[float], float]] = {
        "step": lambda step: config.lr_factor ** (step // every),
        "cosine": lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps)),
        "constant": lambda step: 1.0,
    }
    return factors[config.schedule]


def _fused(groups: list[dict[str, Any]]) -> bool:
    parameters = [p for group in groups for p in group["params"]]
    return all(torch.is_floating_point(p) and p.device.type in ("cpu", "cuda") for p in parameters)
