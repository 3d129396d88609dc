"""Gradient balancing: tasks' gradients combined by an aggregator of torchjd, named here.

J: the Jacobian, one row per task. Rows come from one backward pass per task, so memory grows by
one gradient copy per task; they are averaged over the processes before they are combined, so that
several processes give what one would. Sources: see torchjd.aggregation, which computes the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsemtl.errors import unknown_choice
from sparsemtl.training import distributed

SCOPES = ("shared", "all")

# Aggregators without memory between steps: resuming needs nothing of them.
AGGREGATORS: dict[str, tuple[str, dict[str, Any]]] = {  # name → class of torchjd, its arguments
    "pcgrad": ("PCGrad", {}),
    "upgrad": ("UPGrad", {}),
    "mgda": ("MGDA", {}),
    "cagrad": ("CAGrad", {"c": 0.4}),  # LibMTL's c
    "imtl-g": ("IMTLG", {}),
    "aligned-mtl": ("AlignedMTL", {}),
    "config": ("ConFIG", {}),
    "dualproj": ("DualProj", {}),
    "graddrop": ("GradDrop", {}),
    "fairgrad": ("FairGrad", {"alpha": 1.0}),
    "random": ("Random", {}),
}


@dataclass(frozen=True)
class BalanceConfig:
    """Which rule combines the tasks' gradients, and where."""

    name: str = "pcgrad"
    scope: str = "shared"  # shared: parameters that several tasks use; all: the heads' too

    def __post_init__(self) -> None:
        if self.name not in AGGREGATORS:
            raise ValueError(unknown_choice("balance", self.name, AGGREGATORS))
        if self.scope not in SCOPES:
            raise ValueError(unknown_choice("scope", self.scope, SCOPES))


class Balance:
    """Fills `.grad` of the parameters from the tasks' losses.

    raises: ImportError, from torchjd, with the line that installs what an aggregator needs
    """

    def __init__(self, config: BalanceConfig, seed: int) -> None:
        import torchjd.aggregation as rules

        self.config, self.seed = config, seed
        kind, arguments = AGGREGATORS[config.name]
        self.aggregate: Callable[[Tensor], Tensor] = getattr(rules, kind)(**arguments)

    def backward(
        self, losses: Mapping[str, Tensor], parameters: Sequence[Tensor], step: int
    ) -> None:
        """Add the combined gradient of `losses` to `.grad`.

        losses: task → scalar, already weighted   parameters: those that learn
        raises: ValueError for a task that has no gradient in what the tasks share
        """
        rows = _gradients(losses, parameters)
        uses = [sum(row[i] is not None for row in rows.values()) for i in range(len(parameters))]
        least = 2 if self.config.scope == "shared" and len(losses) > 1 else 1
        joint = [i for i, count in enumerate(uses) if count >= least]
        _check_rows(rows, joint)
        for i, parameter in enumerate(parameters):
            found = [g for row in rows.values() if (g := row[i]) is not None]
            if i not in set(joint) and found:
                _add(parameter, torch.stack(found).sum(dim=0))
        if joint:
            self._combine([parameters[i] for i in joint], rows, joint, step)

    def _combine(
        self,
        parameters: Sequence[Tensor],
        rows: Mapping[str, Sequence[Tensor | None]],
        joint: Sequence[int],
        step: int,
    ) -> None:
        jacobian = torch.stack(
            [
                torch.cat(
                    [
                        (torch.zeros_like(p) if row[i] is None else row[i]).reshape(-1).float()  # type: ignore[union-attr]
                        for i, p in zip(joint, parameters, strict=True)
                    ]
                )
                for row in rows.values()
            ]
        )  # [T, n]
        distributed.average([jacobian])
        devices = [jacobian.device] if jacobian.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            # A rule's random order is the step's own: equal in all processes, and after resuming.
            torch.manual_seed((self.seed << 24) + step)
            combined = self.aggregate(jacobian)
        parts = combined.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            _add(parameter, part.reshape(parameter.shape).to(parameter.dtype))


def _gradients(
    losses: Mapping[str, Tensor], parameters: Sequence[Tensor]
) -> dict[str, tuple[Tensor | None, ...]]:
    last = list(losses)[-1]
    return {
        task: torch.autograd.grad(loss, parameters, retain_graph=task != last, allow_unused=True)
        for task, loss in losses.items()
    }


def _check_rows(rows: Mapping[str, Sequence[Tensor | None]], joint: Sequence[int]) -> None:
    """A task whose loss never reaches the shared parameters cannot be balanced with the others."""
    lost = [task for task, row in rows.items() if all(row[i] is None for i in joint)]
    if lost and len(rows) > 1:
        raise ValueError(
            f"Balance: Expected each task to have a gradient in the backbone, got none of {lost}: "
            "its head is detached, or nothing is shared"
        )


def _add(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
