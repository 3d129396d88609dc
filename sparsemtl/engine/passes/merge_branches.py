"""A sum of 1x1 convolutions is one convolution of the concatenated inputs.

Σ_i W_i x_i + b_i = [W_1 W_2 ...] concat(x_1, x_2, ...) + Σ_i b_i: equal up to the order of the sum.
The last layers of an ASPP head are such a sum: one layer with 4096 inputs in place of four. The
native executor computes the inputs where the concatenation wants them, so joining costs nothing.
"""

from __future__ import annotations

import torch

from sparsemtl.engine.graph import Graph, Node


def merge_branches(graph: Graph) -> int:
    """Merge each tree of additions over such convolutions; returns how many layers went."""
    merged = 0
    for root in [node for node in graph.nodes if node.op == "add"]:
        if root not in graph.nodes or not _plain(root, graph) or _inside_a_sum(root, graph):
            continue
        terms = _terms(root, graph)
        layers = [node for node in map(graph.producers.get, terms) if node is not None]
        layers = [node for node in layers if _mergeable(node, graph)]
        distinct = len({node.inputs[0] for node in layers}) == len(layers)
        if len(layers) < 2 or not distinct:
            continue
        rest = [name for name in terms if name not in {node.output for node in layers}]
        _replace(root, layers, rest, graph)
        merged += len(layers) - 1
    graph.prune()
    return merged


def _inside_a_sum(add: Node, graph: Graph) -> bool:
    readers = graph.consumers[add.output]
    alone = graph.reads(add.output) == 1 and len(readers) == 1
    return alone and readers[0].op == "add" and _plain(readers[0], graph)


def _terms(add: Node, graph: Graph) -> list[str]:
    """What a tree of additions adds up, in order."""
    terms: list[str] = []
    for name in add.inputs:
        inner = graph.producers.get(name)
        is_sum = inner is not None and inner.op == "add" and graph.reads(name) == 1
        if is_sum and inner is not None and _plain(inner, graph):
            terms += _terms(inner, graph)
        else:
            terms.append(name)
    return terms


def _plain(add: Node, graph: Graph) -> bool:
    return len({graph.shape(name) for name in (*add.inputs, add.output)}) == 1


def _mergeable(node: Node, graph: Graph) -> bool:
    if node.op != "conv2d" or graph.reads(node.output) != 1 or len(node.inputs) != 1:
        return False
    a, kernel = node.attrs, node.weights["weight"].shape[2:]
    pointwise = tuple(kernel) == a["stride"] == (1, 1) and a["padding"] == (0, 0)
    return pointwise and a["groups"] == 1 and a["activation"] == ""


def _replace(root: Node, layers: list[Node], rest: list[str], graph: Graph) -> None:
    inputs = tuple(node.inputs[0] for node in layers)
    shapes = [graph.shape(name) for name in inputs]
    channels = sum(shape[1] for shape in shapes)
    dtype = graph.values[inputs[0]].dtype
    joined = graph.add_value(
        f"{root.output}.joined", (shapes[0][0], channels, *shapes[0][2:]), dtype
    )
    concat = Node(
        "concat", graph.free_node_name(f"{root.name}.concat"), inputs, (joined,), {"dim": 1}
    )
    one = layers[-1].copy()
    one.inputs = (joined,)
    one.weights = {"weight": torch.cat([node.weights["weight"] for node in layers], 1)}
    biases = [node.weights["bias"].double() for node in layers if "bias" in node.weights]
    if biases:
        total = torch.stack(biases).sum(0)
        one.weights["bias"] = total.to(one.weights["weight"].dtype)
    chain: list[Node] = [concat, one]
    value = graph.values[root.output]
    for place, name in enumerate(rest):  # what is no such layer is added as before
        partial = graph.add_value(f"{root.output}.part", value.shape, value.dtype)
        chain[-1].outputs = (partial,)
        last = graph.free_node_name(f"{root.name}.{place}")
        chain.append(Node("add", last, (partial, name), ()))
    chain[-1].outputs = root.outputs
    place = graph.nodes.index(root)
    graph.nodes[place : place + 1] = chain
    for node in layers:
        graph.nodes.remove(node)
