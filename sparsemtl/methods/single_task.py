"""Single-task networks: one whole network per task, the reference that shows what sharing costs.

All of them train side by side in one run: their parameters are disjoint and Adam normalises each by
itself, so the loss Σ λ_t L_t trains each as its own run would (but for a clipped global norm).
Source: the reference of Δ in AdaShare and in much of multitask learning.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsemtl.methods.base import Method
from sparsemtl.models.component import Component, layers_of
from sparsemtl.models.mtl import MultitaskModel


@dataclass(frozen=True)
class SingleTaskConfig:
    """Nothing to choose."""


class SingleTaskNetworks(nn.Module):
    """One network per task. [B, 3, H, W] → task → [B, channels, h, w]

    networks: task → a network whose output holds at least that task
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {task: network(x)[task] for task, network in self.networks.items()}

    def components(self) -> dict[str, Component]:
        """One component per network: there is no shared backbone."""
        return {
            f"network:{task}": Component(f"network:{task}", layers_of(network, f"networks.{task}"))
            for task, network in self.networks.items()
        }


def split_by_task(model: nn.Module, tasks: Sequence[str]) -> SingleTaskNetworks:
    """One copy of `model` per task, with equal initial weights.

    Of a MultitaskModel each copy has its own task's head alone; another network is copied whole.
    """
    networks: dict[str, nn.Module] = {}
    for task in tasks:
        if isinstance(model, MultitaskModel):
            networks[task] = copy.deepcopy(
                MultitaskModel(model.backbone, {task: model.heads[task]})
            )
        else:
            networks[task] = copy.deepcopy(model)
    return SingleTaskNetworks(networks)


class SingleTask(Method):
    """Dense, without sharing."""

    name = "single-task"

    def __init__(
        self, config: SingleTaskConfig, components: Mapping[str, Any] | None = None
    ) -> None:
        self.config = config

    def adapt(self, model: nn.Module, tasks: Sequence[str]) -> nn.Module:
        return split_by_task(model, tasks)
