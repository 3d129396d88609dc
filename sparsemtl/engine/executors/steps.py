"""From the engine's graph to the steps of a native program.

Homes in memory are found first, node by node, and steps are noted that will read and write them;
only then are buffers placed and steps written down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from sparsemtl.engine.deferred import values
from sparsemtl.engine.executors import windows
from sparsemtl.engine.executors.buffers import View, contiguous, place
from sparsemtl.engine.executors.forms import MODES, Form, Reads, geometry_of, reads_of
from sparsemtl.engine.executors.homes import MAPS, Home, Homes, Segment
from sparsemtl.engine.executors.support import axis
from sparsemtl.engine.graph import Graph, Node

ACTIVATIONS = {"": 0, "relu": 1, "relu6": 2}
_MOST_TERMS = 8

NativeStep = tuple[str, list[list[int]], list[float], list[np.ndarray]]


@dataclass(frozen=True)
class Lowered:
    """What a native program is built from.

    labels:  the node of each step, and what the step does for it
    """

    arena: int
    externals: list[int]
    steps: list[NativeStep]
    labels: list[tuple[str, str]]


def lower(graph: Graph, segment: Segment, forms: Mapping[str, Form]) -> Lowered:
    """Lower a segment.   forms: how each conv2d and linear node of it runs, by its name"""
    return _Lowering(graph, segment, forms).run()


class _Lowering:
    def __init__(self, graph: Graph, segment: Segment, forms: Mapping[str, Form]) -> None:
        self.graph, self.segment, self.forms = graph, segment, forms
        self.reads = {
            node.name: self._reads(node)
            for node in segment.nodes
            if node.op == "conv2d" and node.name in forms
        }
        self.homes = Homes(graph, segment, self.reads)
        self.pending: list[tuple[str, str, Callable[[], NativeStep]]] = []
        self.copies: dict[tuple[object, ...], Home] = {}  # for convolutions that want them

    def run(self) -> Lowered:
        for at, node in enumerate(self.segment.nodes):
            self.homes.enter(node, at)
            _EMIT[node.op](self, node)
        for name in self.segment.writes:
            home = self.homes[name]
            if home.buffer.slot != self.homes.slots[name]:
                self._map(name, "output", home, self.homes.outside(name))
        arena = place(self.homes.buffers)
        steps = [build() for _, _, build in self.pending]
        labels = [(node, what) for node, what, _ in self.pending]
        return Lowered(arena, self.homes.external_sizes, steps, labels)

    def _reads(self, node: Node) -> Reads:
        source, out = self.graph.shape(node.inputs[0]), self.graph.shape(node.outputs[0])
        padded = self.forms[node.name].padded
        return reads_of(geometry_of(node), (source[2], source[3]), (out[2], out[3]), padded)

    def _step(
        self, node: str, what: str, homes: Sequence[Home], build: Callable[[], NativeStep]
    ) -> None:
        for home in homes:
            home.buffer.touch(len(self.pending))
        self.pending.append((node, what, build))

    def _homes(self, node: Node) -> list[Home]:
        return [self.homes[name] for name in node.inputs]

    def _map(
        self, node: str, what: str, x: Home, y: Home, bounds: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        code = float(MAPS.get(what, 0))

        def build() -> NativeStep:
            views = [x.view(), y.view()]
            if not any(view.has_gaps for view in views):
                views = _cut([view.flat() for view in views])
            return "map", [view.numbers for view in views], [code, *bounds], []

        self._step(node, what, [x, y], build)

    def _source(self, node: Node, reads: Reads, padded: bool) -> Home:
        """The planes that a convolution reads: the value itself, or a copy split by phase."""
        home, stride = self.homes[node.inputs[0]], node.attrs["stride"]
        if stride == (1, 1) and not (padded and home.buffer.slot):
            return home
        key = (stride, reads.phases, reads.gaps)
        known = self.copies.get((node.inputs[0], key))
        if known is not None:
            return known
        batch, channels, height, width = home.shape
        shape = (batch, channels * reads.phases[1], *reads.size)
        kind = ("phases", key, height, width)
        copy = self.homes.new(shape, gaps=reads.gaps, kind=kind)
        self.copies[node.inputs[0], key] = copy
        numbers = [float(n) for n in (*stride, *reads.phases)]  # type: ignore[misc]
        self._step(
            node.name,
            "pad" if stride == (1, 1) else "phases",
            [home, copy],
            lambda: ("phase", [home.view().numbers, copy.view().numbers], numbers, []),
        )
        return copy

    def conv2d(self, node: Node) -> None:
        if node.name not in self.forms:
            self._depthwise(node)
            return
        form, reads = self.forms[node.name], self.reads[node.name]
        assert reads is not None
        source = self._source(node, reads, form.padded)
        taps = np.array(reads.taps, dtype=np.int32).reshape(-1)
        residual, y = [self.homes[name] for name in node.inputs[1:]], self.homes[node.outputs[0]]
        if len(node.outputs) > 1:
            y = Home(y.buffer, 0, y.buffer.shape)
        self._conv(node, form, source, y, residual, reads.phases[1], taps)

    def _conv(
        self,
        node: Node,
        form: Form,
        source: Home,
        y: Home,
        residual: list[Home],
        phases: int,
        taps: np.ndarray,
    ) -> None:
        bias = node.weights.get("bias")
        act = ACTIVATIONS[str(node.attrs["activation"])]
        if node.op == "linear" and len(node.inputs) > 1:
            act = 0  # after the residual, which comes later
        batch, _, height, width = y.shape
        parts = form.parts(batch, height * width)
        lists = form.weight.lists(whole=form.whole, parts=parts)
        arrays = [taps, *lists.arrays]
        if bias is not None:
            arrays.append(bias.detach().contiguous().numpy())
        setting = [phases, form.weight.groups, MODES[form.mode], form.vectors, form.regions, act]
        flags = [len(residual) > 0, bias is not None]
        numbers = [float(n) for n in (*flags, *setting, *lists.sizes)]

        def build() -> NativeStep:
            views = [home.view().numbers for home in (source, y, *residual)]
            return "conv", views, numbers, arrays

        self._step(node.name, form.mode, [source, y, *residual], build)

    def linear(self, node: Node) -> None:
        """Rows are pixels: [N, C] is transposed to planes of N pixels, and back."""
        form, x, y = self.forms[node.name], self.homes[node.inputs[0]], self.homes[node.output]
        *rows, channels = self.graph.shape(node.inputs[0])
        count, out = prod(rows), self.graph.shape(node.output)[-1]
        tap = np.zeros(3, dtype=np.int32)
        across, back = (self.homes.new((1, c, 1, count)) for c in (channels, out))
        self._transpose(node, x, across, forward=True)
        self._conv(node, form, across, back, [], 1, tap)
        self._transpose(node, y, back, forward=False)
        if len(node.inputs) > 1:
            self._sum(node, [y, self.homes[node.inputs[1]]], y)

    def _transpose(self, node: Node, value: Home, planes: Home, *, forward: bool) -> None:
        """From rows [N, C] of a value to planes [C][N], or back."""
        _, columns, _, count = planes.shape

        def build() -> NativeStep:
            plain, copy = value.view(), planes.view()
            rows = View(plain.slot, plain.offset, (1, 1, count, columns), 0, 0, columns)
            turned = View(copy.slot, copy.offset, (1, 1, columns, count), 0, 0, copy.plane)
            views = (rows, turned) if forward else (turned, rows)
            return "transpose", [view.numbers for view in views], [], []

        homes = [value, planes] if forward else [planes, value]
        self._step(node.name, "transpose", homes, build)

    def _depthwise(self, node: Node) -> None:
        g = geometry_of(node)
        x, y = self.homes[node.inputs[0]], self.homes[node.output]
        residual = [self.homes[name] for name in node.inputs[1:]]
        reads = reads_of(g, x.shape[2:], y.shape[2:], True)
        top, left = reads.gaps
        pitch, height = reads.size[1] + left, reads.size[0] + 2 * top
        lead = -(-left // 16) * 16
        shifts = [
            ((phase + reads.phases[0]) * height + dy) * pitch + dx for phase, dy, dx in reads.taps
        ]
        weight = values(node.weights["weight"]).detach().reshape(y.shape[1], -1).numpy()
        bias = node.weights.get("bias")
        arrays = _taps_of(weight, np.array(shifts, dtype=np.int32))
        if bias is not None:
            arrays.append(bias.detach().contiguous().numpy())
        act = ACTIVATIONS[str(node.attrs["activation"])]
        multiplier = y.shape[1] // x.shape[1]
        setting = [multiplier, *g.stride, top, lead, height, pitch, pitch, act]
        flags = [len(residual) > 0, bias is not None, False]
        numbers = [float(n) for n in (*flags, *setting)]

        def build() -> NativeStep:
            views = [home.view().numbers for home in (x, y, *residual)]
            return "depthwise", views, numbers, arrays

        self._step(node.name, "depthwise", [x, y, *residual], build)

    def batch_norm(self, node: Node) -> None:
        """A depthwise convolution with one tap."""
        x, y, w = self.homes[node.inputs[0]], self.homes[node.output], node.weights
        scale = torch.rsqrt(w["var"].double() + float(node.attrs["eps"]))  # type: ignore[arg-type]
        if "weight" in w:
            scale = scale * w["weight"]
        shift = -w["mean"] * scale
        if "bias" in w:
            shift = shift + w["bias"]
        arrays = _taps_of(scale.float().detach().numpy()[:, None], np.zeros(1, dtype=np.int32))
        arrays.append(shift.float().detach().numpy())

        def build() -> NativeStep:
            pitch = x.view().pitch
            setting = [1, 1, 1, 0, 0, x.shape[2], pitch, pitch, 0]
            numbers = [float(n) for n in (False, True, True, *setting)]
            return "depthwise", [x.view().numbers, y.view().numbers], numbers, arrays

        self._step(node.name, "scale", [x, y], build)

    def max_pool2d(self, node: Node) -> None:
        a: dict[str, Any] = node.attrs
        pairs = [a["kernel"], a["stride"], a["padding"], a["dilation"]]
        numbers = [float(n) for pair in pairs for n in pair]
        self._simple(node, "max_pool", numbers, [])

    def avg_pool2d(self, node: Node) -> None:
        a: dict[str, Any] = node.attrs
        source, out = self.homes.shape(node.inputs[0]), self.homes.shape(node.output)
        arrays = []
        for i in range(2):
            parts = a["kernel"][i], a["stride"][i], a["padding"][i], a["count_include_pad"]
            arrays += windows.pool_windows(source[2 + i], out[2 + i], *parts).arrays
        self._simple(node, "mean", [], arrays)

    def adaptive_avg_pool2d(self, node: Node) -> None:
        source = self.homes.shape(node.inputs[0])
        size: Any = node.attrs["size"]
        arrays = windows.adaptive_windows(source[2], size[0]).arrays
        arrays = [*arrays, *windows.adaptive_windows(source[3], size[1]).arrays]
        self._simple(node, "mean", [], arrays)

    def mean(self, node: Node) -> None:
        """Over pixels; the output [B, C] or [B, C, 1, 1] is the same in memory."""
        x, y = self.homes[node.inputs[0]], self.homes[node.output]
        arrays = [
            *windows.adaptive_windows(x.shape[2], 1).arrays,
            *windows.adaptive_windows(x.shape[3], 1).arrays,
        ]
        self._step(
            node.name,
            "mean",
            [x, y],
            lambda: ("mean", [x.view().numbers, y.view().numbers], [], arrays),
        )

    def _simple(
        self, node: Node, kind: str, numbers: list[float], arrays: list[np.ndarray]
    ) -> None:
        homes = [*self._homes(node), self.homes[node.output]]
        self._step(
            node.name,
            kind,
            homes,
            lambda: (kind, [home.view().numbers for home in homes], numbers, arrays),
        )

    def resize(self, node: Node) -> None:
        source, out = self.homes.shape(node.inputs[0]), self.homes.shape(node.output)
        is_nearest = node.attrs["mode"] == "nearest"
        arrays = []
        for i in (2, 3):
            if is_nearest:
                arrays += windows.nearest(source[i], out[i]).arrays
            else:
                corners = bool(node.attrs["align_corners"])
                arrays += windows.bilinear(source[i], out[i], corners).arrays
        self._simple(node, "resize", [float(is_nearest)], arrays)

    def add(self, node: Node) -> None:
        if self.graph.shape(node.inputs[0]) == self.graph.shape(node.inputs[1]):
            self.sum(node)
        else:
            self._binary(node, multiply=False)

    def mul(self, node: Node) -> None:
        self._binary(node, multiply=True)

    def _binary(self, node: Node, *, multiply: bool) -> None:
        y = self.homes[node.output]
        a, b = self._homes(node)
        if self.graph.shape(node.inputs[0]) != self.graph.shape(node.output):
            a, b = b, a
        single = b.shape[3] == 1 and y.shape[3] > 1

        def build() -> NativeStep:
            stretched = b.view().stretched(y.shape)
            assert stretched is not None  # support.py saw to it
            views = [a.view(), stretched, y.view()]
            return "binary", [v.numbers for v in views], [float(multiply), float(single)], []

        self._step(node.name, "mul" if multiply else "add", [a, b, y], build)

    def sum(self, node: Node) -> None:
        self._sum(node, self._homes(node), self.homes[node.output])

    def _sum(self, node: Node, terms: list[Home], y: Home) -> None:
        act = ACTIVATIONS[str(node.attrs.get("activation", ""))]
        done = 0
        while done < len(terms):
            first = done == 0
            now = terms[done : done + _MOST_TERMS - (not first)]
            done += len(now)
            homes = now if first else [y, *now]
            self._sum_step(node, homes, y, act if done == len(terms) else 0)

    def _sum_step(self, node: Node, homes: list[Home], y: Home, act: int) -> None:
        def build() -> NativeStep:
            views = [home.view() for home in (*homes, y)]
            if not any(view.has_gaps for view in views):
                views = _cut([view.flat() for view in views])
            numbers = [float(len(homes)), float(act)]
            return "sum", [view.numbers for view in views], numbers, []

        self._step(node.name, "sum", [*homes, y], build)

    def concat(self, node: Node) -> None:
        whole, channel = self.homes[node.output], 0
        for name in node.inputs:
            x = self.homes[name]
            part = Home(whole.buffer, whole.channel + channel, x.shape)
            channel += x.shape[1]
            if x.buffer is not part.buffer or x.channel != part.channel:
                self._step(
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

    def copy(self, node: Node) -> None:
        """The same floats in the same order under another shape, by way of a row without gaps."""
        x, y = self.homes[node.inputs[0]], self.homes[node.output]
        if x.shape == y.shape:
            self._map(node.name, "copy", x, y)
            return
        between = self.homes.new(x.shape, packed=True)
        again = Home(between.buffer, 0, y.shape)

        def read() -> NativeStep:
            return "map", [x.view().numbers, between.view().numbers], [0.0, 0.0, 0.0], []

        def write() -> NativeStep:
            row = between.view()
            view = contiguous(row.slot, row.offset, y.shape)
            return "map", [view.numbers, y.view().numbers], [0.0, 0.0, 0.0], []

        self._step(node.name, "copy", [x, between], read)
        self._step(node.name, "copy", [again, y], write)

    def map(self, node: Node) -> None:
        bounds = (0.0, 0.0)
        if node.op == "clamp":
            low, high = float(node.attrs["min"]), float(node.attrs["max"])  # type: ignore[arg-type]
            bounds = (low, high)
        self._map(node.name, node.op, self.homes[node.inputs[0]], self.homes[node.output], bounds)

    def _by_class(self, node: Node, home: Home) -> View:
        """The value as [outer, classes, 1, inner]; images as they are."""
        shape = self.graph.shape(node.inputs[0])
        if len(shape) == 4:
            return home.view()
        at = axis(node, self.graph)
        outer, inner = prod(shape[:at]), prod(shape[at + 1 :])
        view = home.view()
        return contiguous(view.slot, view.offset, (outer, shape[at], 1, inner))

    def softmax(self, node: Node) -> None:
        x, y = self.homes[node.inputs[0]], self.homes[node.output]
        self._step(
            node.name,
            "softmax",
            [x, y],
            lambda: ("softmax", [self._by_class(node, h).numbers for h in (x, y)], [], []),
        )

    def argmax(self, node: Node) -> None:
        x, slot = self.homes[node.inputs[0]], self.homes.slots[node.output]
        self._step(
            node.name,
            "argmax",
            [x],
            lambda: ("argmax", [self._by_class(node, x).numbers], [float(slot)], []),
        )


def _cut(views: list[View]) -> list[View]:
    """A long flat row as planes, so that threads can share it; whole where it divides unevenly."""
    floats = views[0].floats
    for parts in (64, 32, 16, 8, 4, 2):
        if floats % parts == 0 and floats // parts >= 1024:
            size = floats // parts
            return [View(v.slot, v.offset, (1, parts, 1, size), floats, size, size) for v in views]
    return views


def _taps_of(weight: np.ndarray, shifts: np.ndarray) -> list[np.ndarray]:
    """Live taps of each row of a depthwise weight [K, T]: where they begin, shifts, weights."""
    live = weight != 0
    first = np.concatenate([[0], np.cumsum(live.sum(1))]).astype(np.int32)
    rows, taps = np.nonzero(live)
    return [first, shifts[taps], np.ascontiguousarray(weight[rows, taps])]


_EMIT: dict[str, Callable[[_Lowering, Node], None]] = {
    "conv2d": _Lowering.conv2d,
    "linear": _Lowering.linear,
    "batch_norm": _Lowering.batch_norm,
    "max_pool2d": _Lowering.max_pool2d,
    "avg_pool2d": _Lowering.avg_pool2d,
    "adaptive_avg_pool2d": _Lowering.adaptive_avg_pool2d,
    "mean": _Lowering.mean,
    "resize": _Lowering.resize,
    "add": _Lowering.add,
    "mul": _Lowering.mul,
    "sum": _Lowering.sum,
    "concat": _Lowering.concat,
    "softmax": _Lowering.softmax,
    "argmax": _Lowering.argmax,
    **dict.fromkeys(("relu", "relu6", "clamp", "sigmoid", "silu", "hardswish"), _Lowering.map),
    **dict.fromkeys(("identity", "flatten", "reshape"), _Lowering.copy),
}
