"""From the engine's graph to the steps of a native program."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sparsemtl.engine.executors import emit_conv as conv
from sparsemtl.engine.executors import emit_image as image
from sparsemtl.engine.executors.forms import Form
from sparsemtl.engine.executors.homes import Segment
from sparsemtl.engine.executors.lowering import Lowered, Lowering
from sparsemtl.engine.graph import Graph, Node

_EMIT: dict[str, Callable[[Lowering, Node], None]] = {
    "conv2d": conv.conv2d,
    "linear": conv.linear,
    "batch_norm": conv.batch_norm,
    "max_pool2d": image.max_pool2d,
    "avg_pool2d": image.avg_pool2d,
    "adaptive_avg_pool2d": image.adaptive_avg_pool2d,
    "mean": image.mean,
    "resize": image.resize,
    "add": image.add,
    "mul": image.mul,
    "sum": image.sum_,
    "concat": image.concat,
    "softmax": image.softmax,
    "argmax": image.argmax,
    **dict.fromkeys(("relu", "relu6", "clamp", "sigmoid", "silu", "hardswish"), image.map_),
    **dict.fromkeys(("identity", "flatten", "reshape"), image.copy),
}


def lower(graph: Graph, segment: Segment, forms: Mapping[str, Form]) -> Lowered:
    """Lower a segment.   forms: how each conv2d and linear node of it runs, by its name"""
    low = Lowering(graph, segment, forms)
    for at, node in enumerate(segment.nodes):
        low.homes.enter(node, at)
        _EMIT[node.op](low, node)
    return low.finish()
