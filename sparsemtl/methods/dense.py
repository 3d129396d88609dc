"""No pruning: the dense multitask model, the reference of AdapMTL's Δ."""

from __future__ import annotations

from dataclasses import dataclass

from sparsemtl.methods.base import Method


@dataclass(frozen=True)
class DenseConfig:
    """Nothing to choose."""


class Dense(Method):
    """Trains every weight."""

    def __init__(self, config: DenseConfig) -> None:
        self.config = config
