"""Which executor runs a plan, and how it runs each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sparsemtl.engine.deferred import decoded
from sparsemtl.engine.executors.device import DeviceExecutor
from sparsemtl.engine.executors.device_cast import DeviceWeights
from sparsemtl.engine.executors.support import why_not
from sparsemtl.engine.executors.torch import TorchExecutor
from sparsemtl.engine.graph import Graph, Node
from sparsemtl.engine.liveness import peak_bytes
from sparsemtl.engine.select import executor_of, fits, select
from sparsemtl.engine.selection import DENSE, Selection
from sparsemtl.engine.target import Target
from sparsemtl.ops.availability import why_not_native
from sparsemtl.ops.dispatch import BackendUnavailable


@dataclass(frozen=True)
class Choice:
    """How a node runs.

    runs_as:    "torch", "native", or a form of the native or the device executor
    because:    why, in words
    candidates: seconds of each form that was timed
    """

    runs_as: str
    because: str
    candidates: dict[str, float] = field(default_factory=dict)


class Executor(Protocol):
    """Runs one graph; any number of threads may call it at once.

    peak_bytes: memory for values in one call
    where:      device, type and whether as one graph, in words; empty on the CPU
    """

    where: str

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The graph's outputs.   inputs: as the graph declares them"""
        ...

    @property
    def peak_bytes(self) -> int: ...

    def choice(self, node: Node) -> Choice:
        """How a node of the graph runs, and why."""
        ...


class PlainTorch:
    """Every node through torch, as the op's meaning is written."""

    where = ""

    def __init__(self, graph: Graph) -> None:
        self._run = TorchExecutor(decoded(graph))
        self.peak_bytes = peak_bytes(graph)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self._run(*inputs)

    def choice(self, node: Node) -> Choice:
        return Choice("torch", "the torch executor runs everything")


class Selected:
    """Each layer as measured on this machine: the native core, or torch where it is faster.

    known: what was chosen for this graph before, on this machine; None: choose now
    """

    where = ""

    def __init__(self, graph: Graph, mode: str, known: Selection | None = None) -> None:
        self.from_file = known is not None and fits(known, graph)
        self.selection = known if known is not None and self.from_file else select(graph, mode)
        self.measured = mode == "measured"
        self._whole_in_torch = self.selection.whole == DENSE
        self._run = executor_of(graph, self.selection)
        self._why_not = {node.name: why_not(node, graph) for node in graph.nodes}
        self.peak_bytes = getattr(self._run, "peak_bytes", peak_bytes(graph))

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self._run(*inputs)

    def choice(self, node: Node) -> Choice:
        layer = self.selection.layers.get(node.name)
        candidates = {} if layer is None else layer.candidates
        reason = self._why_not[node.name]
        if self._whole_in_torch:
            return Choice("torch", reason or "torch runs the whole graph faster", candidates)
        if reason is not None:
            return Choice("torch", reason, candidates)
        if layer is None:
            why = _why_native(node)
            return Choice("native", why)
        return Choice("torch" if layer.choice == DENSE else layer.choice, layer.reason, candidates)


def _why_native(node: Node) -> str:
    """Why the native core runs a node of which no candidates were timed."""
    if not node.weights:
        return "the native core has it, and it has no weights"
    if node.op != "conv2d" or node.attrs["groups"] > 1:
        return "the native core computes every weight of it"
    return "merged with the layer before that reads the same"


class OnDevice:
    """One CUDA graph of a target's device; on the CPU, the same calls one by one."""

    def __init__(self, graph: Graph, target: Target, weights: DeviceWeights | None) -> None:
        self.run = DeviceExecutor(decoded(graph), target, weights)
        self.peak_bytes, self.where = self.run.peak_bytes, self.run.where

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        return self.run(*inputs)

    def choice(self, node: Node) -> Choice:
        runs_as, because, candidates = self.run.runs_as(node)
        return Choice(runs_as, because, dict(candidates))


def _auto(graph: Graph, known: Selection | None) -> Executor:
    if _why_not_selected(graph) is None:
        return Selected(graph, "measured", known)
    return PlainTorch(graph)


EXECUTORS: dict[str, Callable[[Graph, Selection | None], Executor]] = {
    "auto": _auto,
    "native": lambda graph, known: Selected(_checked(graph), "measured", known),
    "sparse": lambda graph, known: Selected(_checked(graph), "sparse"),
    "torch": lambda graph, known: PlainTorch(graph),
    "device": lambda graph, known: OnDevice(graph, Target(torch.device("cpu")), None),
}


def make_executor(
    name: str,
    graph: Graph,
    known: Selection | None = None,
    target: Target | None = None,
    weights: DeviceWeights | None = None,
) -> Executor:
    """An executor for a graph, whose weights may be deferred.

    name:    a key of EXECUTORS
    known:   what a file says was chosen for it on this machine
    target:  a device and type; then "auto" is "device"
    weights: on the device already, of the engine's other plans
    raises:  BackendUnavailable for one asked for by name that cannot run here
    """
    if target is None:
        return EXECUTORS[name](graph, known)
    if name in ("auto", "device"):
        return OnDevice(graph, target, weights)
    raise BackendUnavailable(
        f"engine cannot run on {name!r}: it computes on the CPU, and {target.device} was asked "
        "for. Choose executor='device', or leave it open"
    )


def _checked(graph: Graph) -> Graph:
    reason = _why_not_selected(graph)
    if reason is not None:
        raise BackendUnavailable(
            f"engine cannot run on 'native': {reason}. Choose executor='torch', or leave it open"
        )
    return graph


def _why_not_selected(graph: Graph) -> str | None:
    weights = [w for node in graph.nodes for w in node.weights.values()]
    if any(weight.device.type not in ("cpu", "meta") for weight in weights):
        return "its weights are not on the CPU"
    if any(graph.values[name].dtype is not torch.float32 for name in graph.inputs):
        return "its input is not float32"
    return why_not_native()
