"""Channels that are the same number everywhere: found, carried along, and folded into biases.

A dead filter gives its bias at every pixel, or 0. That constant passes through activations,
pooling, resizing, sums and concatenations. A convolution that reads it without padding adds
Σ w · constant to its bias, after which it reads the channel no more; 0 may be read through padding
too, because padding is 0 itself. Another constant met by padding makes the border differ: it is
left alone.

Equal up to the rounding of the folded products, which are added in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemtl.engine.graph import Graph, Node
from sparsemtl.engine.ops import activate, compute

_ACTIVATIONS = ("clamp", "hardswish", "relu", "relu6", "sigmoid", "silu")
_POINTWISE = ("add", "batch_norm", "identity", "mul", "sum", *_ACTIVATIONS)
_KEEPS = ("adaptive_avg_pool2d", "max_pool2d", "resize")  # the constant itself


@dataclass(frozen=True)
class Constants:
    """Of a value [B, C, H, W].   known: [C] bool   number: [C] of the value's dtype, 0 elsewhere"""

    known: Tensor
    number: Tensor


def fold_constants(graph: Graph) -> dict[str, Constants]:
    """Fold constant channels into the convolutions that read them; every value's constants."""
    found: dict[str, Constants] = {}
    for node in graph.nodes:
        if len(node.outputs) != 1 or len(graph.shape(node.output)) != 4:
            continue
        inputs = [found.get(name) for name in node.inputs]
        known = _follow(node, inputs, graph)
        if known is not None and bool(known.known.any()):
            found[node.output] = known
    return found


def _follow(node: Node, inputs: list[Constants | None], graph: Graph) -> Constants | None:
    if node.op == "conv2d":
        if inputs[0] is not None:
            _fold_into(node, inputs[0])
        return _dead_filters(node, inputs[1] if len(inputs) == 2 else None)
    if any(len(graph.shape(name)) != 4 for name in node.inputs) or not inputs:
        return None
    if node.op == "concat" and node.attrs["dim"] in (1, -3):
        return _concatenated(node, inputs, graph)
    first = inputs[0]
    if node.op in _POINTWISE and all(c is not None for c in inputs):
        return _pointwise(node, [c for c in inputs if c is not None])
    if first is None:
        return None
    if node.op in _KEEPS:
        return first
    if node.op == "avg_pool2d" and (
        node.attrs["padding"] == (0, 0) or not node.attrs["count_include_pad"]
    ):
        return first
    if node.op == "mean" and sorted(d % 4 for d in node.attrs["dims"]) == [2, 3]:
        return first
    return None


def _fold_into(node: Node, read: Constants) -> None:
    """Move what constant channels contribute into the bias, and zero their weights."""
    weight, groups = node.weights["weight"], node.attrs["groups"]
    foldable = read.known & read.number.isfinite()
    if node.attrs["padding"] != (0, 0):
        foldable &= read.number == 0
    rows, per_group = weight.shape[:2]
    by_group = weight.reshape(groups, rows // groups, per_group, -1)
    chosen = foldable.reshape(groups, 1, per_group, 1)
    used = (by_group != 0) & chosen
    if not bool(used.any()):
        return
    number = read.number.double().reshape(groups, 1, per_group, 1)
    moved = torch.where(used, by_group.double() * number, 0.0).sum((2, 3)).reshape(rows)
    node.weights = {**node.weights, "weight": by_group.masked_fill(chosen, 0).reshape(weight.shape)}
    if bool((moved != 0).any()):
        bias = node.weights.get("bias", torch.zeros_like(weight[:, 0, 0, 0]))
        node.weights["bias"] = (bias.double() + moved).to(weight.dtype)


def _dead_filters(node: Node, residual: Constants | None) -> Constants | None:
    weight = node.weights["weight"]
    known = (weight == 0).flatten(1).all(1)
    number = node.weights.get("bias", torch.zeros_like(weight[:, 0, 0, 0]))
    if len(node.inputs) == 2:
        if residual is None:
            return None
        known = known & residual.known
        number = number + residual.number
    number = activate(number, node.attrs["activation"])
    return Constants(known, torch.where(known, number, 0.0))


def _concatenated(node: Node, inputs: list[Constants | None], graph: Graph) -> Constants:
    like = next((c.number for c in inputs if c is not None), torch.zeros(0))
    parts = []
    for name, part in zip(node.inputs, inputs, strict=True):
        zeros = like.new_zeros(graph.shape(name)[1])
        parts.append(Constants(zeros.bool(), zeros) if part is None else part)
    return Constants(torch.cat([p.known for p in parts]), torch.cat([p.number for p in parts]))


def _pointwise(node: Node, inputs: list[Constants]) -> Constants | None:
    if len({len(part.known) for part in inputs}) != 1:
        return None
    known = torch.stack([part.known for part in inputs]).all(0)
    (number,) = compute(node, *(part.number[None, :, None, None] for part in inputs))
    return Constants(known, torch.where(known, number.flatten(), 0.0))
