"""Who runs a graph: plain torch, or the native core where it is faster."""

from __future__ import annotations

from collections.abc import Callable

from sparsemtl.engine.executors.base import Choice, Executor
from sparsemtl.engine.executors.torch import TorchExecutor
from sparsemtl.engine.graph import Graph

__all__ = ["EXECUTORS", "Choice", "Executor", "make_executor"]

EXECUTORS: dict[str, Callable[[Graph], Executor]] = {
    "auto": TorchExecutor,
    "torch": TorchExecutor,
}


def make_executor(name: str, graph: Graph) -> Executor:
    """An executor for a graph.   name: a key of EXECUTORS"""
    return EXECUTORS[name](graph)
