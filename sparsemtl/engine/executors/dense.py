"""Torch at its best: convolutions on prepacked weights with all that is fused, channels last.

This is what a model without zeros should run through, and what sparse kernels are measured against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsemtl.engine.deferred import with_values
from sparsemtl.engine.executors.torch import last_reads
from sparsemtl.engine.graph import Graph, Node
from sparsemtl.engine.ops import activate, compute

# Activation → oneDNN's name and numbers.
_UNARY: dict[str, tuple[str, list[float]]] = {
    "": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}
Call = Callable[..., "tuple[Tensor, ...]"]


def dense_call(node: Node, graph: Graph) -> Call:
    """The fastest way that torch has to run a node of a graph."""
    node = with_values(node)
    shape = graph.shape(node.inputs[0]) if node.inputs else ()
    if node.op == "conv2d" and _prepackable(node, shape):
        call = _convolution(node, shape)
        if len(node.outputs) == 1:
            return call
        sizes = [graph.shape(name)[1] for name in node.outputs]  # of a merged convolution
        return lambda *inputs: call(*inputs)[0].split(sizes, 1)

    def plain(*inputs: Tensor) -> tuple[Tensor, ...]:
        return compute(node, *inputs)

    return plain


def _prepackable(node: Node, shape: tuple[int, ...]) -> bool:
    weight = node.weights["weight"]
    return (
        torch.backends.mkldnn.is_available()
        and weight.dtype is torch.float32
        and not weight.is_cuda
        and 0 not in shape
        and weight.numel() > 0
    )


def _convolution(node: Node, shape: tuple[int, ...]) -> Call:
    a: dict[str, Any] = node.attrs
    geometry = (list(a["padding"]), list(a["stride"]), list(a["dilation"]), a["groups"])
    dense = node.weights["weight"].detach().to(memory_format=torch.channels_last)
    weight = torch.ops.mkldnn._reorder_convolution_weight(dense, *geometry, list(shape))
    bias, (name, numbers) = node.weights.get("bias"), _UNARY[a["activation"]]
    bias = None if bias is None else bias.detach()

    def unary(x: Tensor) -> tuple[Tensor, ...]:
        y = torch.ops.mkldnn._convolution_pointwise(
            _channels_last(x), weight, bias, *geometry, name, numbers, ""
        )
        return (y,)

    def binary(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        y = torch.ops.mkldnn._convolution_pointwise.binary(
            _channels_last(x), _channels_last(residual), weight, bias, *geometry,
            "add", 1.0, "relu" if name == "relu" else None, [], None,
        )  # fmt: skip
        return (activate(y, a["activation"]) if name == "hardtanh" else y,)

    return unary if len(node.inputs) == 1 else binary


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class DenseExecutor:
    """Runs a graph on the CPU through torch, fused and prepacked; safe to call from many threads.

    only: the nodes to run; by default all of the graph's
    """

    name = "dense"

    def __init__(self, graph: Graph, only: tuple[Node, ...] | None = None) -> None:
        nodes = tuple(graph.nodes) if only is None else only
        self._calls: dict[str, Call] = {node.name: dense_call(node, graph) for node in nodes}
        # A prepacked weight is not kept twice; other weights their calls hold.
        self.graph = graph.bare()
        self.nodes = tuple(node.bare() for node in nodes)
        self._drop_after: Mapping[str, tuple[str, ...]] = {} if only else last_reads(graph)

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The graph's outputs, contiguous.   inputs: as the graph declares them"""
        values = dict(zip(self.graph.inputs, inputs, strict=True))
        with torch.no_grad():
            self.run(values)
        return {task: values[name].contiguous() for task, name in self.graph.outputs.items()}

    def run(self, values: dict[str, Tensor]) -> None:
        """Run the nodes over `values`, in place; under inference mode."""
        for node in self.nodes:
            found = self._calls[node.name](*(values[name] for name in node.inputs))
            values.update(zip(node.outputs, found, strict=True))
            for name in self._drop_after.get(node.name, ()):
                del values[name]
