"""Seconds of one layer in every form that may be fastest, each on the layer's own shapes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparsemtl.engine.executors.dense import Call, dense_call
from sparsemtl.engine.executors.forms import Form, default_form, geometry_of
from sparsemtl.engine.executors.native import NativeExecutor
from sparsemtl.engine.graph import Graph, Node, Value
from sparsemtl.engine.pack import PackedWeight, pack_weight
from sparsemtl.engine.selection import DENSE, form_name
from sparsemtl.ops.availability import native_module

ROUNDS, BUDGET = 5, 0.5  # timed rounds of a layer, and seconds after which no further one begins
_HOPELESS = 1.4


def time_layer(node: Node, graph: Graph, structures: list[str]) -> dict[str, float]:
    """Best seconds of each candidate, which take turns; the default first, dense last."""
    alone = _alone(node, graph)
    inputs = [torch.randn(alone.shape(name)) for name in alone.inputs]
    calls: dict[str, Callable[[], float]] = {}
    for form in _candidates(node, alone, structures):
        calls[form_name(form)] = _native_seconds(NativeExecutor(alone, {node.name: form}), inputs)
    calls[DENSE] = _dense_seconds(dense_call(node, alone), inputs)
    best = dict.fromkeys(calls, math.inf)
    begin = time.perf_counter()
    for turn in range(1 + ROUNDS):
        if turn > 1 and time.perf_counter() - begin > BUDGET:
            break
        for name, call in calls.items():
            seconds = call()
            if turn > 0:  # the first is for caches and pages
                best[name] = min(best[name], seconds)
        if turn == 2:  # the hopeless take no more time
            limit = _HOPELESS * min(best.values())
            calls = {name: call for name, call in calls.items() if best[name] <= limit}
    return best


def _native_seconds(executor: NativeExecutor, inputs: list[Tensor]) -> Callable[[], float]:
    """Its steps, but for the copies that only a layer by itself needs."""

    def run() -> float:
        steps = executor.profile(*inputs)
        return sum(step.seconds for step in steps if step.what not in ("pad", "output"))

    return run


def _dense_seconds(call: Call, inputs: list[Tensor]) -> Callable[[], float]:
    """Conversions between torch's order of a tensor and ours included."""

    def run() -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            for y in call(*inputs):
                y.contiguous()
        return time.perf_counter() - begin

    return run


def _alone(node: Node, graph: Graph) -> Graph:
    """A graph of this node only."""
    values: dict[str, Value] = {name: graph.values[name] for name in node.inputs}
    values |= {name: graph.values[name] for name in node.outputs}
    outputs = {f"y{i}": name for i, name in enumerate(node.outputs)}
    return Graph([node], values, tuple(dict.fromkeys(node.inputs)), outputs)


def _candidates(node: Node, graph: Graph, structures: list[str]) -> list[Form]:
    """Forms worth timing, the default first."""
    found: dict[str, Form] = {}
    for structure in structures:
        form = default_form(node, graph, packed(node, structure))
        found.setdefault(form_name(form), form)
        others = ("table", "linear", "direct") if node.op == "conv2d" else ("table",)
        for mode in (form.mode, *(m for m in others if m != form.mode)):
            regions = mode == "table" and regions_of(form, node, graph)
            for width in _widths(form, mode):
                other = Form(form.weight, mode, width, regions)
                found.setdefault(form_name(other), other)
    return list(found.values())


def _widths(form: Form, mode: str) -> tuple[int, ...]:
    """Vectors of pixels worth trying: few keep a panel in the L1 cache, many repay its copies."""
    if form.weight.vector > 1 or native_module().isa() == "generic":
        return (form.vectors,)
    if mode == "direct":
        return (8, 12)
    return (4, 6, 8) if mode == form.mode else (4, 8)


def packed(node: Node, structure: str) -> PackedWeight:
    """A node's weight in one structure."""
    groups = int(node.attrs.get("groups", 1))
    return pack_weight(node.weights["weight"], groups, structure)


def regions_of(form: Form, node: Node, graph: Graph) -> bool:
    """As the default form has it, or would have it in table mode."""
    return form.regions if form.mode == "table" else _regions_pay(node, graph)


def _regions_pay(node: Node, graph: Graph) -> bool:
    """Whether ordering pixels by their taps would let tiles skip taps on padding."""
    if node.op != "conv2d":
        return False
    g = geometry_of(node)
    size = graph.shape(node.inputs[0])[2:]
    reach = [d * (k - 1) for d, k in zip(g.dilation, g.kernel, strict=True)]
    return g.stride == (1, 1) and any(4 * r > n for r, n in zip(reach, size, strict=True))
