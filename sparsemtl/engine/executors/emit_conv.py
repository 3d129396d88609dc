"""Steps of what has weights: convolutions, linear layers, batch norms."""

from __future__ import annotations

from math import prod

import numpy as np
import torch

from sparsemtl.engine.deferred import values
from sparsemtl.engine.executors.buffers import View
from sparsemtl.engine.executors.emit_image import sum_of
from sparsemtl.engine.executors.forms import MODES, Form, Reads, geometry_of, reads_of
from sparsemtl.engine.executors.homes import Home
from sparsemtl.engine.executors.lowering import ACTIVATIONS, Lowering, NativeStep
from sparsemtl.engine.graph import Node


def conv2d(low: Lowering, node: Node) -> None:
    if node.name not in low.forms:
        _depthwise(low, node)
        return
    form, reads = low.forms[node.name], low.reads[node.name]
    assert reads is not None
    source = _source(low, node, reads, form.padded)
    taps = np.array(reads.taps, dtype=np.int32).reshape(-1)
    residual, y = [low.homes[name] for name in node.inputs[1:]], low.homes[node.outputs[0]]
    if len(node.outputs) > 1:
        y = Home(y.buffer, 0, y.buffer.shape)
    _packed(low, node, form, source, y, residual, reads.phases[1], taps)


def _packed(
    low: Lowering,
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

    low.step(node.name, form.mode, [source, y, *residual], build)


def linear(low: Lowering, node: Node) -> None:
    """Rows are pixels: [N, C] is transposed to planes of N pixels, and back."""
    form, x, y = low.forms[node.name], low.homes[node.inputs[0]], low.homes[node.output]
    *rows, channels = low.graph.shape(node.inputs[0])
    count, out = prod(rows), low.graph.shape(node.output)[-1]
    tap = np.zeros(3, dtype=np.int32)
    across, back = (low.homes.new((1, c, 1, count)) for c in (channels, out))
    _transpose(low, node, x, across, forward=True)
    _packed(low, node, form, across, back, [], 1, tap)
    _transpose(low, node, y, back, forward=False)
    if len(node.inputs) > 1:
        sum_of(low, node, [y, low.homes[node.inputs[1]]], y)


def _transpose(low: Lowering, node: Node, value: Home, planes: Home, *, forward: bool) -> None:
    """From rows [N, C] of a value to planes [C][N], or back."""
    _, columns, _, count = planes.shape

    def build() -> NativeStep:
        plain, copy = value.view(), planes.view()
        rows = View(plain.slot, plain.offset, (1, 1, count, columns), 0, 0, columns)
        turned = View(copy.slot, copy.offset, (1, 1, columns, count), 0, 0, copy.plane)
        views = (rows, turned) if forward else (turned, rows)
        return "transpose", [view.numbers for view in views], [], []

    homes = [value, planes] if forward else [planes, value]
    low.step(node.name, "transpose", homes, build)


def _depthwise(low: Lowering, node: Node) -> None:
    g = geometry_of(node)
    x, y = low.homes[node.inputs[0]], low.homes[node.output]
    residual = [low.homes[name] for name in node.inputs[1:]]
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

    low.step(node.name, "depthwise", [x, y, *residual], build)


def batch_norm(low: Lowering, node: Node) -> None:
    """A depthwise convolution with one tap."""
    x, y, w = low.homes[node.inputs[0]], low.homes[node.output], node.weights
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

    low.step(node.name, "scale", [x, y], build)


def _source(low: Lowering, node: Node, reads: Reads, padded: bool) -> Home:
    """The planes that a convolution reads: the value itself, or a copy split by phase."""
    home, stride = low.homes[node.inputs[0]], node.attrs["stride"]
    if stride == (1, 1) and not (padded and home.buffer.slot):
        return home
    key = (stride, reads.phases, reads.gaps)
    known = low.copies.get((node.inputs[0], key))
    if known is not None:
        return known
    batch, channels, height, width = home.shape
    shape = (batch, channels * reads.phases[1], *reads.size)
    kind = ("phases", key, height, width)
    copy = low.homes.new(shape, gaps=reads.gaps, kind=kind)
    low.copies[node.inputs[0], key] = copy
    numbers = [float(n) for n in (*stride, *reads.phases)]  # type: ignore[misc]
    low.step(
        node.name,
        "pad" if stride == (1, 1) else "phases",
        [home, copy],
        lambda: ("phase", [home.view().numbers, copy.view().numbers], numbers, []),
    )
    return copy


def _taps_of(weight: np.ndarray, shifts: np.ndarray) -> list[np.ndarray]:
    """Live taps of each row of a depthwise weight [K, T]: where they begin, shifts, weights."""
    live = weight != 0
    first = np.concatenate([[0], np.cumsum(live.sum(1))]).astype(np.int32)
    rows, taps = np.nonzero(live)
    return [first, shifts[taps], np.ascontiguousarray(weight[rows, taps])]
