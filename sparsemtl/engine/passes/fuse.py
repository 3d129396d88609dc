"""Let a convolution or linear layer add a residual and apply ReLU or ReLU6 itself.

Exact up to the order of one addition: y + bias + residual in place of (y + bias) + residual.
"""

from __future__ import annotations

from sparsemtl.engine.graph import Graph, Node

_LAYERS = ("conv2d", "linear")


def fuse_residual(graph: Graph) -> int:
    """conv then add → conv with a residual; returns how many additions went.

    The layer moves to where the addition was, so that the residual is there. Of two layers that
    meet in an addition the later one takes it; chains of additions fuse one after the other.
    """
    fused = 0
    for add in [node for node in graph.nodes if node.op == "add"]:
        producers = graph.producers
        order = {node.name: place for place, node in enumerate(graph.nodes)}
        layers = [
            (order[producers[name].name], name)
            for name in add.inputs
            if name in producers and _open(producers[name], name, add, graph)
        ]
        if not layers:
            continue
        _, name = max(layers)
        layer = producers[name]
        (residual,) = [other for other in add.inputs if other != name]
        layer.inputs = (layer.inputs[0], residual)
        _take_over(layer, add, graph)
        fused += 1
    return fused


def fuse_activation(graph: Graph) -> int:
    """conv then ReLU or ReLU6 → conv with an activation; returns how many went."""
    fused = 0
    for node in [node for node in graph.nodes if node.op in ("relu", "relu6")]:
        layer = graph.producers.get(node.inputs[0])
        if layer is None or layer.op not in _LAYERS or graph.reads(layer.output) != 1:
            continue
        # ReLU6 of a ReLU, and ReLU of either, is one activation too.
        both = {layer.attrs["activation"], node.op}
        layer.attrs["activation"] = "relu6" if "relu6" in both else "relu"
        _take_over(layer, node, graph)
        fused += 1
    return fused


def _open(layer: Node, name: str, add: Node, graph: Graph) -> bool:
    """Whether a layer may take the addition that reads it."""
    same = graph.shape(add.inputs[0]) == graph.shape(add.inputs[1])  # no broadcasting
    plain = layer.op in _LAYERS and len(layer.inputs) == 1 and layer.attrs["activation"] == ""
    return same and plain and graph.reads(name) == 1 and add.inputs[0] != add.inputs[1]


def _take_over(layer: Node, node: Node, graph: Graph) -> None:
    """Let `layer` stand in `node`'s place and write its output."""
    del graph.values[layer.output]
    layer.outputs = node.outputs
    graph.nodes.remove(layer)
    graph.nodes[graph.nodes.index(node)] = layer
