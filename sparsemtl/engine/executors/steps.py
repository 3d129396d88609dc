"""From the engine's graph to the steps of a native program: homes in memory, then steps.

A value's home is a buffer, or some channels of one: the inputs of a concatenation are computed
where it wants them, a residual's sum takes the place of the residual, and what a padded
convolution reads stands between zeros already. Only then are buffers placed and steps written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from sparsemtl.engine.executors import windows
from sparsemtl.engine.executors.buffers import Buffer, View, contiguous, four, place
from sparsemtl.engine.executors.forms import MODES, Form, Reads, geometry_of, reads_of
from sparsemtl.engine.executors.support import axis
from sparsemtl.engine.graph import Graph, Node

ACTIVATIONS = {"": 0, "relu": 1, "relu6": 2}
MAPS = {"copy": 0, "relu": 1, "relu6": 2, "clamp": 3, "sigmoid": 4, "silu": 5, "hardswish": 6}
_MOST_TERMS = 8

NativeStep = tuple[str, list[list[int]], list[float], list[np.ndarray]]


@dataclass
class Home:
    """Channels [channel, channel + shape[1]) of a buffer."""

    buffer: Buffer
    channel: int
    shape: tuple[int, int, int, int]

    def view(self) -> View:
        return self.buffer.view(self.channel, self.shape[1])


@dataclass(frozen=True)
class Segment:
    """Nodes that one program runs.   reads, writes: values that it takes and gives, in order"""

    nodes: tuple[Node, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


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
        self.buffers: list[Buffer] = []
        self.homes: dict[str, Home] = {}
        self.pending: list[tuple[str, str, Callable[[], NativeStep]]] = []
        self.padded: dict[tuple[str, tuple[object, ...]], Home] = {}  # copies for convolutions
        self.external = {name: slot + 1 for slot, name in enumerate(segment.reads)}
        for slot, name in enumerate(segment.writes):
            self.external[name] = len(segment.reads) + 1 + slot
        self.reads = {
            node.name: self._reads(node) for node in segment.nodes if node.name in forms
        }
        self.last_read = {
            name: place for place, node in enumerate(segment.nodes) for name in node.inputs
        }

    def run(self) -> Lowered:
        inside = {name for node in self.segment.nodes for name in node.outputs}
        self.slices = self._find_slices(inside)
        self.gaps = self._find_gaps()
        for name in self.segment.reads:
            self.homes[name] = self._external_home(name)
        for place_, node in enumerate(self.segment.nodes):
            self._home_of(node, place_)
            _EMIT[node.op](self, node)
        self._write_outputs()
        arena = place(self.buffers)
        steps = [build() for _, _, build in self.pending]
        values = (*self.segment.reads, *self.segment.writes)
        sizes = [self._floats(name) for name in values]
        return Lowered(arena, sizes, steps, [(node, what) for node, what, _ in self.pending])

    # Homes.

    def _floats(self, name: str) -> int:
        value = self.graph.values[name]
        return prod(value.shape) * value.dtype.itemsize // 4

    def _shape(self, name: str) -> tuple[int, int, int, int]:
        return four(self.graph.shape(name))

    def _reads(self, node: Node) -> Reads | None:
        if node.op != "conv2d":
            return None
        source, out = self.graph.shape(node.inputs[0]), self.graph.shape(node.output)
        form = self.forms[node.name]
        return reads_of(geometry_of(node), source[2:], out[2:], form.padded)  # type: ignore[arg-type]

    def _find_gaps(self) -> dict[str, tuple[int, int]]:
        """Zeros that convolutions without a stride want around a value."""
        gaps: dict[str, tuple[int, int]] = {}
        for node in self.segment.nodes:
            reads = self.reads.get(node.name)
            if reads is None or node.attrs["stride"] != (1, 1):
                continue
            y, x = gaps.get(node.inputs[0], (0, 0))
            gaps[node.inputs[0]] = (max(y, reads.gaps[0]), max(x, reads.gaps[1]))
        return gaps

    def _find_slices(self, inside: set[str]) -> dict[str, tuple[Node, int]]:
        """Values that are computed where a concatenation wants them, and from which channel on."""
        slices: dict[str, tuple[Node, int]] = {}
        for node in self.segment.nodes:
            if node.op != "concat" or len(self.graph.shape(node.output)) != 4:
                continue
            channel = 0
            for name in node.inputs:
                free = name in inside and name not in slices and name not in self.external
                if free and node.inputs.count(name) == 1:
                    slices[name] = (node, channel)
                channel += self.graph.shape(name)[1]
        return slices

    def _new_buffer(self, shape: tuple[int, int, int, int], **details: Any) -> Buffer:
        buffer = Buffer(shape, **details)
        self.buffers.append(buffer)
        return buffer

    def _external_home(self, name: str) -> Home:
        shape = self._shape(name)
        return Home(self._new_buffer(shape, slot=self.external[name]), 0, shape)

    def _arena_home(self, name: str) -> Home:
        shape, packed = self._shape(name), len(self.graph.shape(name)) < 4
        return Home(self._new_buffer(shape, packed=packed), 0, shape)

    def _home_of(self, node: Node, place_: int) -> None:
        """Find the home of what the node writes."""
        name = node.output
        if name in self.homes:
            return  # begun by the first input of a concatenation
        home = self._slice_home(name) or self._home_in_place(node, place_)
        if home is None:
            if name in self.external and self.gaps.get(name, (0, 0)) == (0, 0):
                home = self._external_home(name)
            else:
                home = self._arena_home(name)
        self.homes[name] = home
        self._widen(home, name)

    def _slice_home(self, name: str) -> Home | None:
        if name not in self.slices:
            return None
        node, channel = self.slices[name]
        whole = self.homes.get(node.output)
        if whole is None:
            whole = self._slice_home(node.output)
            if whole is None:
                gaps = [self.gaps.get(n, (0, 0)) for n in self._family(node)]
                outside = node.output in self.external and set(gaps) == {(0, 0)}
                whole = (self._external_home if outside else self._arena_home)(node.output)
            self.homes[node.output] = whole
            self._widen(whole, node.output)
        return Home(whole.buffer, whole.channel + channel, self._shape(name))

    def _family(self, node: Node) -> list[str]:
        """A concatenation and what is computed into it, at any depth."""
        names = [node.output]
        for name, (into, _) in self.slices.items():
            if into is node:
                names.append(name)
                names += [n for n, (deep, _) in self.slices.items() if name == deep.output]
        return names

    def _home_in_place(self, node: Node, place_: int) -> Home | None:
        """The home of an input that nobody reads after this node, where it may be overwritten."""
        if node.output in self.external:
            return None
        for name in _overwritten(node):
            home = self.homes[name]
            same = self.graph.shape(name) == self.graph.shape(node.output)
            dead = self.last_read[name] == place_ and node.inputs.count(name) == 1
            if same and dead and home.buffer.slot == 0 and name not in self.external:
                return home
        return None

    def _widen(self, home: Home, name: str) -> None:
        y, x = self.gaps.get(name, (0, 0))
        if (y, x) != (0, 0):
            old = home.buffer.gaps
            home.buffer.gaps = (max(old[0], y), max(old[1], x))

    def _write_outputs(self) -> None:
        for name in self.segment.writes:
            home = self.homes[name]
            if home.buffer.slot != self.external[name]:
                self._map(name, "output", home, self._external_home(name))

    # Steps.

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
        known = self.padded.get((node.inputs[0], key))
        if known is not None:
            return known
        batch, channels, height, width = home.shape
        shape = (batch, channels * reads.phases[1], *reads.size)
        kind = ("phases", key, height, width)
        copy = Home(self._new_buffer(shape, gaps=reads.gaps, kind=kind), 0, shape)
        self.padded[node.inputs[0], key] = copy
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
        residual = [self.homes[name] for name in node.inputs[1:]]
        self._conv(node, form, source, self.homes[node.output], residual, reads.phases[1], taps)

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
        arrays = [taps, *form.weight.arrays()]
        if bias is not None:
            arrays.append(bias.detach().contiguous().numpy())
        setting = [phases, form.weight.groups, MODES[form.mode], form.vectors, form.regions, act]
        flags = [len(residual) > 0, bias is not None]
        numbers = [float(n) for n in (*flags, *setting, *form.weight.list.sizes)]

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
        across, back = [
            Home(self._new_buffer((1, c, 1, count)), 0, (1, c, 1, count)) for c in (channels, out)
        ]
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
            ((phase + reads.phases[0]) * height + dy) * pitch + dx
            for phase, dy, dx in reads.taps
        ]
        weight = node.weights["weight"].detach().reshape(y.shape[1], -1).numpy()
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
        source, out = self._shape(node.inputs[0]), self._shape(node.output)
        arrays = []
        for i in range(2):
            parts = a["kernel"][i], a["stride"][i], a["padding"][i], a["count_include_pad"]
            arrays += windows.pool_windows(source[2 + i], out[2 + i], *parts).arrays
        self._simple(node, "mean", [], arrays)

    def adaptive_avg_pool2d(self, node: Node) -> None:
        source = self._shape(node.inputs[0])
        size: Any = node.attrs["size"]
        arrays = [*windows.adaptive_windows(source[2], size[0]).arrays]
        self._simple(node, "mean", [], [*arrays, *windows.adaptive_windows(source[3], size[1]).arrays])

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
        source, out = self._shape(node.inputs[0]), self._shape(node.output)
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
        between = Home(self._new_buffer(x.shape, packed=True), 0, x.shape)
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
        x, slot = self.homes[node.inputs[0]], self.external[node.output]
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
            return [
                View(v.slot, v.offset, (1, parts, 1, size), floats, size, size) for v in views
            ]
    return views


def _overwritten(node: Node) -> Sequence[str]:
    """Inputs in whose place the output may be computed: pixel by pixel, read before written."""
    if node.op == "conv2d":
        return node.inputs[1:]
    if node.op in ("add", "mul", "sum"):
        return node.inputs
    return node.inputs[:1] if node.op in ("relu", "relu6", "clamp", "sigmoid", "silu", "hardswish") else ()


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
