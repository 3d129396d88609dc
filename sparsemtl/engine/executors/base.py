"""What every executor offers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from sparsemtl.engine.graph import Node


@dataclass(frozen=True)
class Choice:
    """How a node runs.

    runs_as:    "torch", or a form of the native executor
    because:    why, in words
    candidates: seconds of each form that was timed
    """

    runs_as: str
    because: str
    candidates: dict[str, float] = field(default_factory=dict)


class Executor(Protocol):
    """Runs one graph; any number of threads may call it at once."""

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The graph's outputs.   inputs: as the graph declares them"""
        ...

    @property
    def peak_bytes(self) -> int:
        """Memory for values in one call."""
        ...

    def choice(self, node: Node) -> Choice:
        """How a node of the graph runs, and why."""
        ...
