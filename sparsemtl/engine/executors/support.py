"""Which nodes the native executor takes, and why it leaves the others to torch."""

from __future__ import annotations

import torch

from sparsemtl.engine.graph import Graph, Node

_MOST_AXES = 4


def why_not(node: Node, graph: Graph) -> str | None:
    """None if the node can run natively, else the reason."""
    for name in (*node.inputs, *node.outputs):
        value = graph.values[name]
        if value.dtype is not torch.float32 and node.op != "argmax":
            return f"{name} is {value.dtype}, and the native executor computes in float32"
        if not 1 <= len(value.shape) <= _MOST_AXES:
            return f"{name} has {len(value.shape)} axes, not 1 to {_MOST_AXES}"
        if 0 in value.shape:
            return f"{name} is empty"
    if node.op == "argmax" and graph.values[node.inputs[0]].dtype is not torch.float32:
        return f"{node.inputs[0]} is {graph.values[node.inputs[0]].dtype}"
    if any(weight.dtype is not torch.float32 for weight in node.weights.values()):
        return "it has weights of another type than float32"
    bias = node.weights.get("bias")
    if bias is not None and bias.dim() != 1:
        return f"its bias has {bias.dim()} axes, not one"
    if node.op not in _RULES:
        return str(node.attrs.get("target", node.op)) + " is not an op of the native executor"
    return _RULES[node.op](node, graph)


def axis(node: Node, graph: Graph) -> int:
    """The node's `dim`, counted from the front."""
    rank = len(graph.shape(node.inputs[0]))
    return int(node.attrs["dim"]) % rank  # type: ignore[arg-type]


def _never(node: Node, graph: Graph) -> str | None:
    return None


def _rows(node: Node, graph: Graph) -> str | None:
    if len(graph.shape(node.inputs[0])) == _MOST_AXES:
        return f"{node.inputs[0]} has {_MOST_AXES} axes"
    return None


def _images(node: Node, graph: Graph) -> str | None:
    for name in (*node.inputs, *node.outputs):
        if len(graph.shape(name)) != _MOST_AXES:
            return f"{name} is no [B, C, H, W]"
    return None


def _broadcast(node: Node, graph: Graph) -> str | None:
    """One input has the output's shape; the other fits it axis by axis."""
    out = graph.shape(node.output)
    shapes = [graph.shape(name) for name in node.inputs]
    if all(shape == out for shape in shapes):
        return None
    ranked = all(len(shape) == len(out) == _MOST_AXES for shape in shapes)
    if ranked and out in shapes:
        return None
    return f"it broadcasts {shapes[0]} with {shapes[-1]}"


def _equal_shapes(node: Node, graph: Graph) -> str | None:
    out = graph.shape(node.output)
    if any(graph.shape(name) != out for name in node.inputs):
        return "its inputs differ in shape"
    return None


def _channels(node: Node, graph: Graph) -> str | None:
    if axis(node, graph) != 1:
        return f"it joins along axis {axis(node, graph)}, not channels"
    return None


def _class_axis(node: Node, graph: Graph) -> str | None:
    if len(graph.shape(node.inputs[0])) == _MOST_AXES and axis(node, graph) != 1:
        return f"it goes along axis {axis(node, graph)} of an image, not channels"
    return None


def _mean(node: Node, graph: Graph) -> str | None:
    dims = {int(d) % _MOST_AXES for d in node.attrs["dims"]}  # type: ignore[union-attr]
    if len(graph.shape(node.inputs[0])) != _MOST_AXES or dims != {2, 3}:
        return "it is no mean over an image's pixels"
    return None


_RULES = {
    "conv2d": _images,
    "linear": _rows,
    "batch_norm": _images,
    "max_pool2d": _images,
    "avg_pool2d": _images,
    "adaptive_avg_pool2d": _images,
    "resize": _images,
    "add": _broadcast,
    "mul": _broadcast,
    "sum": _equal_shapes,
    "concat": _channels,
    "softmax": _class_axis,
    "argmax": _class_axis,
    "mean": _mean,
    **dict.fromkeys(("relu", "relu6", "clamp", "sigmoid", "silu", "hardswish"), _never),
    **dict.fromkeys(("identity", "flatten", "reshape"), _never),
}
