"""The graph: its rules, its printing, and the torch executor that says what it means."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsemtl.engine.executors.torch import TorchExecutor
from sparsemtl.engine.graph import Graph, Node, Value
from sparsemtl.errors import GraphError

CONV = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "activation": "relu"}


def small() -> Graph:
    """y = relu(conv(x) + x), p = max_pool(y), both answers."""
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    pool = {
        "kernel": (2, 2),
        "stride": (2, 2),
        "padding": (0, 0),
        "dilation": (1, 1),
        "ceil_mode": False,
    }
    nodes = [
        Node("conv2d", "first", ("x", "x"), ("y",), dict(CONV), {"weight": weight}),
        Node("max_pool2d", "pool", ("y",), ("p",), pool),
    ]
    shapes = {"x": (2, 4, 6, 8), "y": (2, 4, 6, 8), "p": (2, 4, 3, 4)}
    values = {name: Value(name, shape, torch.float32) for name, shape in shapes.items()}
    return Graph(nodes, values, ("x",), {"depth": "y", "normals": "p"})


def test_a_graph_computes_what_its_ops_mean():
    graph = small()
    graph.validate()
    x = torch.randn(2, 4, 6, 8)
    found = TorchExecutor(graph)(x)
    expected = F.relu(F.conv2d(x, graph.nodes[0].weights["weight"], padding=1) + x)
    assert list(found) == ["depth", "normals"]
    torch.testing.assert_close(found["depth"], expected)
    torch.testing.assert_close(found["normals"], F.max_pool2d(expected, 2))


def test_a_copy_is_its_own_but_for_the_tensors():
    graph = small()
    twin = graph.copy()
    twin.nodes[0].attrs["groups"] = 2
    twin.nodes[0].weights["bias"] = torch.zeros(4)
    twin.outputs["depth"] = "p"
    assert graph.nodes[0].attrs["groups"] == 1
    assert list(graph.nodes[0].weights) == ["weight"]
    assert graph.outputs["depth"] == "y"
    assert twin.nodes[0].weights["weight"] is graph.nodes[0].weights["weight"]


def _set(name: str, value: object):
    def change(graph: Graph) -> None:
        graph.nodes[0].attrs[name] = value  # type: ignore[assignment]

    return change


def _swap(graph: Graph) -> None:
    graph.nodes.reverse()


def _bad_weight(graph: Graph) -> None:
    graph.nodes[0].weights["weight"] = torch.zeros(4, 5, 3, 3)


def _bad_shape(graph: Graph) -> None:
    graph.values["p"] = Value("p", (2, 4, 3, 5), torch.float32)


def _bad_output(graph: Graph) -> None:
    graph.outputs["depth"] = "nowhere"


def _written_twice(graph: Graph) -> None:
    graph.nodes[1].outputs = ("y",)


def _unknown_op(graph: Graph) -> None:
    graph.nodes[0].op = "conv3d"


def _stray_value(graph: Graph) -> None:
    graph.values["z"] = Value("z", (1,), torch.float32)


WRONG = {
    "stride-zero": (_set("stride", (0, 1)), "stride of 'first' to be a positive pair"),
    "padding-negative": (_set("padding", (-1, 1)), "padding"),
    "padding-huge": (_set("padding", (1 << 40, 1)), "padding"),
    "groups-bool": (_set("groups", True), "groups"),
    "groups-that-do-not-divide": (_set("groups", 3), "'first'"),
    "activation-unknown": (_set("activation", "tanh"), "activation"),
    "attribute-unknown": (_set("colour", 1), "attributes"),
    "read-before-written": (_swap, "written before"),
    "weight-of-other-channels": (_bad_weight, "'first'"),
    "shape-declared-wrong": (_bad_shape, "'pool'"),
    "output-nowhere": (_bad_output, "'depth'"),
    "value-written-twice": (_written_twice, "written once"),
    "op-unknown": (_unknown_op, "conv2d"),
    "value-of-nobody": (_stray_value, "'z'"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_contradiction_is_named(change, words):
    graph = small()
    change(graph)
    with pytest.raises(GraphError, match=words):
        graph.validate()


def test_printing_names_values_ops_and_shapes():
    text = str(small())
    assert "y[2, 4, 6, 8] = conv2d(x, x, weight[4, 4, 3, 3], stride=(1, 1)" in text
    assert text.splitlines()[-1] == "output normals: p[2, 4, 3, 4]"


def test_prune_and_sort():
    graph = small()
    del graph.outputs["normals"]
    graph.prune()
    assert [node.name for node in graph.nodes] == ["first"]
    assert list(graph.values) == ["x", "y"]
    other = small()
    other.nodes.reverse()
    other.sort()
    other.validate()


def test_a_torch_node_runs_any_aten_operator():
    arguments = '{"args": [{"input": 0}, 0.25], "kwargs": {}}'
    node = Node(
        "torch",
        "hs",
        ("x",),
        ("y",),
        {"target": "aten::hardshrink.default", "arguments": arguments},
    )
    values = {name: Value(name, (3, 5), torch.float32) for name in "xy"}
    graph = Graph([node], values, ("x",), {"t": "y"})
    graph.validate()
    x = torch.randn(3, 5)
    assert TorchExecutor(graph)(x)["t"].equal(F.hardshrink(x, 0.25))
    node.attrs["target"] = "aten::no_such.default"
    with pytest.raises(GraphError, match="no_such"):
        graph.validate()
