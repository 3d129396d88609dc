"""Small graphs for the native executor, and the comparison with plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemtl.engine.executors.forms import Form, default_form
from sparsemtl.engine.executors.native import NativeExecutor, packable
from sparsemtl.engine.executors.support import why_not
from sparsemtl.engine.executors.torch import TorchExecutor
from sparsemtl.engine.graph import Graph, Node, Value
from sparsemtl.engine.ops import infer_outputs
from sparsemtl.engine.pack import pack_weight


def default_forms(graph: Graph) -> dict[str, Form]:
    """A sparse form for each node that has one, unmeasured."""
    return {
        node.name: default_form(
            node,
            graph,
            pack_weight(node.weights["weight"], int(node.attrs.get("groups", 1))),
        )
        for node in graph.nodes
        if packable(node, graph) and why_not(node, graph) is None
    }


class Maker:
    """Builds a graph node by node; shapes are inferred."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.inputs: list[str] = []
        self.random = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def input(self, *shape: int) -> str:
        name = f"x{len(self.inputs)}"
        self.values[name] = Value(name, shape, torch.float32)
        self.inputs.append(name)
        return name

    def node(self, op: str, *inputs: str, weights: dict[str, Tensor] | None = None, **attrs) -> str:
        name = f"{op}_{len(self.nodes)}"
        node = Node(op, name, inputs, (f"{name}.out",), attrs, weights or {})
        ((shape, dtype),) = infer_outputs(node, [self.values[i] for i in inputs])
        self.values[node.output] = Value(node.output, shape, dtype)
        self.nodes.append(node)
        return node.output

    def weight(self, *shape: int, sparsity: float = 0.7) -> Tensor:
        weight = self.tensor(*shape)
        return torch.where(torch.rand(shape, generator=self.random) < sparsity, 0.0, weight)

    def conv(
        self,
        x: str,
        out: int,
        kernel: int | tuple[int, int] = 3,
        *,
        residual: str | None = None,
        sparsity: float = 0.7,
        bias: bool = True,
        groups: int = 1,
        activation: str = "",
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> str:
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        channels = self.values[x].shape[1] // groups
        weights = {"weight": self.weight(out, channels, *kernel, sparsity=sparsity)}
        if bias:
            weights["bias"] = self.tensor(out)
        return self.node(
            "conv2d", *([x] if residual is None else [x, residual]), weights=weights,
            stride=stride, padding=padding, dilation=dilation, groups=groups,
            activation=activation,
        )  # fmt: skip

    def graph(self, *outputs: str) -> Graph:
        graph = Graph(
            self.nodes, self.values, tuple(self.inputs), {f"t{i}": o for i, o in enumerate(outputs)}
        )
        graph.validate()
        return graph

    def example(self) -> tuple[Tensor, ...]:
        return tuple(self.tensor(*self.values[name].shape) for name in self.inputs)


def native(graph: Graph) -> NativeExecutor:
    return NativeExecutor(graph, default_forms(graph))


def assert_same(maker: Maker, *outputs: str, runs: int = 2) -> NativeExecutor:
    """Run natively and with torch, and compare; a second run must not see the first's leftovers."""
    graph = maker.graph(*outputs)
    executor = native(graph)
    reference = TorchExecutor(graph)
    for _ in range(runs):
        example = maker.example()
        expected, got = reference(*example), executor(*example)
        assert list(got) == list(expected)
        for task, tensor in expected.items():
            assert got[task].shape == tensor.shape
            assert got[task].dtype == tensor.dtype
            assert_near(got[task], tensor)
    return executor


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Equal up to rounding, which is in proportion to the largest value."""
    scale = float(expected.abs().max()) if expected.numel() > 0 else 0.0
    torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-5 * max(scale, 1e-3))


def all_native(executor: NativeExecutor) -> bool:
    return all(is_native for is_native, _ in executor.segments)
