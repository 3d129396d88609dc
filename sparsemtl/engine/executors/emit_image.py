"""Steps of what has no weights: pooling, resizing, sums, pointwise functions, classes."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from sparsemtl.engine.executors import windows
from sparsemtl.engine.executors.buffers import View, contiguous
from sparsemtl.engine.executors.homes import Home
from sparsemtl.engine.executors.lowering import ACTIVATIONS, Lowering, NativeStep, cut
from sparsemtl.engine.executors.support import axis
from sparsemtl.engine.graph import Node

_MOST_TERMS = 8


def max_pool2d(low: Lowering, node: Node) -> None:
    a: dict[str, Any] = node.attrs
    pairs = [a["kernel"], a["stride"], a["padding"], a["dilation"]]
    numbers = [float(n) for pair in pairs for n in pair]
    _simple(low, node, "max_pool", numbers, [])


def avg_pool2d(low: Lowering, node: Node) -> None:
    a: dict[str, Any] = node.attrs
    source, out = low.homes.shape(node.inputs[0]), low.homes.shape(node.output)
    arrays = []
    for i in range(2):
        parts = a["kernel"][i], a["stride"][i], a["padding"][i], a["count_include_pad"]
        arrays += windows.pool_windows(source[2 + i], out[2 + i], *parts).arrays
    _simple(low, node, "mean", [], arrays)


def adaptive_avg_pool2d(low: Lowering, node: Node) -> None:
    source = low.homes.shape(node.inputs[0])
    size: Any = node.attrs["size"]
    arrays = windows.adaptive_windows(source[2], size[0]).arrays
    arrays = [*arrays, *windows.adaptive_windows(source[3], size[1]).arrays]
    _simple(low, node, "mean", [], arrays)


def mean(low: Lowering, node: Node) -> None:
    """Over pixels; the output [B, C] or [B, C, 1, 1] is the same in memory."""
    x, y = low.homes[node.inputs[0]], low.homes[node.output]
    arrays = [
        *windows.adaptive_windows(x.shape[2], 1).arrays,
        *windows.adaptive_windows(x.shape[3], 1).arrays,
    ]
    low.step(
        node.name,
        "mean",
        [x, y],
        lambda: ("mean", [x.view().numbers, y.view().numbers], [], arrays),
    )


def _simple(
    low: Lowering, node: Node, kind: str, numbers: list[float], arrays: list[np.ndarray]
) -> None:
    homes = [*low.inputs(node), low.homes[node.output]]
    low.step(
        node.name,
        kind,
        homes,
        lambda: (kind, [home.view().numbers for home in homes], numbers, arrays),
    )


def resize(low: Lowering, node: Node) -> None:
    source, out = low.homes.shape(node.inputs[0]), low.homes.shape(node.output)
    is_nearest = node.attrs["mode"] == "nearest"
    arrays = []
    for i in (2, 3):
        if is_nearest:
            arrays += windows.nearest(source[i], out[i]).arrays
        else:
            corners = bool(node.attrs["align_corners"])
            arrays += windows.bilinear(source[i], out[i], corners).arrays
    _simple(low, node, "resize", [float(is_nearest)], arrays)


def add(low: Lowering, node: Node) -> None:
    if low.graph.shape(node.inputs[0]) == low.graph.shape(node.inputs[1]):
        sum_(low, node)
    else:
        _binary(low, node, multiply=False)


def mul(low: Lowering, node: Node) -> None:
    _binary(low, node, multiply=True)


def _binary(low: Lowering, node: Node, *, multiply: bool) -> None:
    y = low.homes[node.output]
    a, b = low.inputs(node)
    if low.graph.shape(node.inputs[0]) != low.graph.shape(node.output):
        a, b = b, a
    single = b.shape[3] == 1 and y.shape[3] > 1

    def build() -> NativeStep:
        stretched = b.view().stretched(y.shape)
        assert stretched is not None  # support.py saw to it
        views = [a.view(), stretched, y.view()]
        return "binary", [v.numbers for v in views], [float(multiply), float(single)], []

    low.step(node.name, "mul" if multiply else "add", [a, b, y], build)


def sum_(low: Lowering, node: Node) -> None:
    sum_of(low, node, low.inputs(node), low.homes[node.output])


def sum_of(low: Lowering, node: Node, terms: list[Home], y: Home) -> None:
    act = ACTIVATIONS[str(node.attrs.get("activation", ""))]
    done = 0
    while done < len(terms):
        first = done == 0
        now = terms[done : done + _MOST_TERMS - (not first)]
        done += len(now)
        homes = now if first else [y, *now]
        _sum_step(low, node, homes, y, act if done == len(terms) else 0)


def _sum_step(low: Lowering, node: Node, homes: list[Home], y: Home, act: int) -> None:
    def build() -> NativeStep:
        views = [home.view() for home in (*homes, y)]
        if not any(view.has_gaps for view in views):
            views = cut([view.flat() for view in views])
        numbers = [float(len(homes)), float(act)]
        return "sum", [view.numbers for view in views], numbers, []

    low.step(node.name, "sum", [*homes, y], build)


def concat(low: Lowering, node: Node) -> None:
    whole, channel = low.homes[node.output], 0
    for name in node.inputs:
        x = low.homes[name]
        part = Home(whole.buffer, whole.channel + channel, x.shape)
        channel += x.shape[1]
        if x.buffer is not part.buffer or x.channel != part.channel:
            low.step(
                node.name,
                "copy",
                [x, part],
                lambda x=x, part=part: (  # type: ignore[misc]
                    "map",
                    [x.view().numbers, part.view().numbers],
                    [0.0, 0.0, 0.0],
                    [],
                ),
            )


def copy(low: Lowering, node: Node) -> None:
    """The same floats in the same order under another shape, by way of a row without gaps."""
    x, y = low.homes[node.inputs[0]], low.homes[node.output]
    if x.shape == y.shape:
        low.map(node.name, "copy", x, y)
        return
    between = low.homes.new(x.shape, packed=True)
    again = Home(between.buffer, 0, y.shape)

    def read() -> NativeStep:
        return "map", [x.view().numbers, between.view().numbers], [0.0, 0.0, 0.0], []

    def write() -> NativeStep:
        row = between.view()
        view = contiguous(row.slot, row.offset, y.shape)
        return "map", [view.numbers, y.view().numbers], [0.0, 0.0, 0.0], []

    low.step(node.name, "copy", [x, between], read)
    low.step(node.name, "copy", [again, y], write)


def map_(low: Lowering, node: Node) -> None:
    bounds = (0.0, 0.0)
    if node.op == "clamp":
        bounds = float(node.attrs["min"]), float(node.attrs["max"])
    low.map(node.name, node.op, low.homes[node.inputs[0]], low.homes[node.output], bounds)


def _by_class(low: Lowering, node: Node, home: Home) -> View:
    """The value as [outer, classes, 1, inner]; images as they are."""
    shape = low.graph.shape(node.inputs[0])
    if len(shape) == 4:
        return home.view()
    at = axis(node, low.graph)
    outer, inner = prod(shape[:at]), prod(shape[at + 1 :])
    view = home.view()
    return contiguous(view.slot, view.offset, (outer, shape[at], 1, inner))


def softmax(low: Lowering, node: Node) -> None:
    x, y = low.homes[node.inputs[0]], low.homes[node.output]
    low.step(
        node.name,
        "softmax",
        [x, y],
        lambda: ("softmax", [_by_class(low, node, h).numbers for h in (x, y)], [], []),
    )


def argmax(low: Lowering, node: Node) -> None:
    x, slot = low.homes[node.inputs[0]], low.homes.slots[node.output]
    low.step(
        node.name,
        "argmax",
        [x],
        lambda: ("argmax", [_by_class(low, node, x).numbers], [float(slot)], []),
    )
