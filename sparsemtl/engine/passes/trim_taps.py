"""Trim kernel rows and columns that read only zero padding, as rates beyond the map's size do.

Tap i of a dilated kernel reads rows o·stride − padding + i·dilation. Where that lies outside the
map for every output row o, its products are zeros: dropping them changes no bit but the sign of a
zero. Depends on the map's size, so it is done for each plan.
"""

from __future__ import annotations

from sparsemtl.engine.deferred import cut
from sparsemtl.engine.graph import Graph, Node


def trim_taps(graph: Graph) -> int:
    """Trim each convolution; returns how many taps went."""
    trimmed = 0
    for node in graph.nodes:
        if node.op == "conv2d":
            trimmed += _trim(node, graph)
    return trimmed


def _trim(node: Node, graph: Graph) -> int:
    weight = node.weights["weight"]
    sizes, outs = graph.shape(node.inputs[0])[2:], graph.shape(node.output)[2:]
    ends = [_dead_ends(node, axis, sizes[axis], outs[axis]) for axis in (0, 1)]
    if not any(map(any, ends)):
        return 0
    (top, bottom), (left, right) = ends
    rows, columns = weight.shape[2:]
    every = slice(None)
    kept = cut(weight, (every, every, slice(top, rows - bottom), slice(left, columns - right)))
    padding, dilation = node.attrs["padding"], node.attrs["dilation"]
    # What is cut in front moves the first tap by so many dilations; as much is cut behind.
    node.attrs["padding"] = (padding[0] - top * dilation[0], padding[1] - left * dilation[1])
    node.weights = {**node.weights, "weight": kept}
    return rows * columns - kept.shape[2] * kept.shape[3]


def _dead_ends(node: Node, axis: int, size: int, out: int) -> tuple[int, int]:
    """How many taps of an axis may be cut in front and behind, equally many for equal padding."""
    kernel = node.weights["weight"].shape[2 + axis]
    stride, padding, dilation = (
        node.attrs[name][axis] for name in ("stride", "padding", "dilation")
    )

    def alive(tap: int) -> bool:
        first = tap * dilation - padding
        return any(0 <= first + o * stride < size for o in range(out))

    front = next((i for i in range(kernel) if alive(i)), 0)
    back = next((i for i in range(kernel) if alive(kernel - 1 - i)), 0)
    count = min(front, back)
    while count and padding - count * dilation < 0:
        count -= 1
    return count, count
