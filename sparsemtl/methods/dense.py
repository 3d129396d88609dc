"""No pruning: the dense multitask model, the reference of AdapMTL's Δ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsemtl.methods.base import Method


@dataclass(frozen=True)
class DenseConfig:
    """Nothing to choose."""


class Dense(Method):
    """Trains every weight."""

    def __init__(self, config: DenseConfig, components: Mapping[str, Any] | None = None) -> None:
        self.config = config
