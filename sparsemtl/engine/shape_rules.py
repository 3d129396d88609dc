"""Output shapes of the commonest ops, without torch.

On tensors without memory torch computes any shape, but imports its compiler to do so, which takes
longer than loading an engine. These rules say the same (a test compares them); where one is not
sure, it returns None and torch is asked, which also words the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsemtl.engine.graph import Node, Value

Shape = tuple[int, ...]


def output_shape(node: Node, inputs: Sequence[Value]) -> Shape | None:
    """The shape of a node's output; its dtype is that of the inputs. None: ask torch."""
    rule = _RULES.get(node.op)
    if rule is None or not inputs or len(node.outputs) != 1:
        return None
    first = inputs[0]
    tensors = [w.dtype for w in node.weights.values()]
    same_type = all(v.dtype is first.dtype for v in inputs) and set(tensors) <= {first.dtype}
    if not first.dtype.is_floating_point or not same_type:
        return None
    return rule(node, [value.shape for value in inputs])


def _same(node: Node, shapes: list[Shape]) -> Shape | None:
    return shapes[0] if len(set(shapes)) == 1 else None


def _conv2d(node: Node, shapes: list[Shape]) -> Shape | None:
    x, weight, a = shapes[0], node.weights["weight"].shape, node.attrs
    if len(x) != 4 or len(weight) != 4 or 0 in x or 0 in weight:
        return None
    groups, bias = a["groups"], node.weights.get("bias")
    if weight[1] * groups != x[1] or weight[0] % groups:
        return None
    if bias is not None and tuple(bias.shape) != (weight[0],):
        return None
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            x[2:], a["padding"], a["dilation"], weight[2:], a["stride"], strict=True
        )
    ]
    y = (x[0], weight[0], *size)
    return y if min(size) >= 1 and all(residual == y for residual in shapes[1:]) else None


def _concat(node: Node, shapes: list[Shape]) -> Shape | None:
    if any(len(shape) != 4 or 0 in shape for shape in shapes) or node.attrs["dim"] != 1:
        return None
    if len({(shape[0], *shape[2:]) for shape in shapes}) != 1:
        return None
    return (shapes[0][0], sum(shape[1] for shape in shapes), *shapes[0][2:])


def _max_pool2d(node: Node, shapes: list[Shape]) -> Shape | None:
    x, a = shapes[0], node.attrs
    too_far = any(2 * p > k for p, k in zip(a["padding"], a["kernel"], strict=True))
    if len(x) != 4 or 0 in x or too_far:
        return None
    size = []
    for n, p, d, k, s in zip(
        x[2:], a["padding"], a["dilation"], a["kernel"], a["stride"], strict=True
    ):
        span = n + 2 * p - d * (k - 1) - 1
        out = (span + (s - 1 if a["ceil_mode"] else 0)) // s + 1
        if a["ceil_mode"] and (out - 1) * s >= n + p:
            out -= 1  # the last window must begin inside
        size.append(out)
    return (x[0], x[1], *size) if min(size) >= 1 else None


_POINTWISE = ("clamp", "hardswish", "identity", "relu", "relu6", "sigmoid", "silu")
_RULES: dict[str, Callable[[Node, list[Shape]], Shape | None]] = {
    **dict.fromkeys((*_POINTWISE, "add", "mul", "sum"), _same),
    "concat": _concat,
    "conv2d": _conv2d,
    "max_pool2d": _max_pool2d,
}
