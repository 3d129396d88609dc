"""Which kernel each layer runs on: timed on this machine, on the layer's own shapes.

A layer's candidates are torch's fused dense convolution, and the sparse kernel in each structure
that the weight's zeros have, mode and tile width. Choices are kept in a file of this machine beside
those of training (`SPARSEMTL_CACHE`), by shape, geometry and density bucket.

Afterwards the whole is weighed: torch keeps its tensors in an order of its own, so that one dense
layer between sparse ones pays for two conversions, while a model without zeros is fastest as a
whole in torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sparsemtl.engine.choices import known_times, remember_times
from sparsemtl.engine.executors.dense import Call, DenseExecutor, dense_call
from sparsemtl.engine.executors.forms import MODES, Form, default_form, geometry_of
from sparsemtl.engine.executors.native import NativeExecutor, packable, prepared
from sparsemtl.engine.executors.support import why_not
from sparsemtl.engine.graph import Graph, Node, Value
from sparsemtl.engine.pack import PackedWeight, density, pack_weight, structures_of
from sparsemtl.errors import unknown_choice
from sparsemtl.ops.availability import native_module, why_not_native
from sparsemtl.sparsity.choice import density_bucket
from sparsemtl.timing import interleave

SELECT = ("measured", "sparse", "dense")
DENSE = "dense"
ROUNDS, BUDGET = 5, 0.5  # timed rounds of a layer, and seconds after which no further one begins
WIDTHS = (1, 2, 3, 4, 6, 8, 12)  # registers of pixels in a tile, see cpu/sparse_conv2d.inc.h
_MOSTLY_LIVE = 0.6  # share of live weights from which on rows gain by sharing their loads
_LITTLE_FILL = 1.1
_HOPELESS = 1.4
MARGIN = 0.95  # another candidate than the default must be this much faster


@dataclass(frozen=True)
class LayerChoice:
    """What one layer runs on and why.

    density:    share of weights that are not zero
    candidates: name → seconds, measured alone; empty where nothing was measured
    choice:     one of them: "dense", or "structure/mode/vectors" of a sparse form
    """

    layer: str
    density: float
    candidates: dict[str, float]
    choice: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """Choices by layer, and whether torch runs the whole graph.

    apart: convolutions of one input and geometry that are faster each by itself
    """

    layers: dict[str, LayerChoice] = field(default_factory=dict)
    whole: str = "native"
    apart: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """As plain data for a file."""
        return {
            "whole": self.whole,
            "apart": list(self.apart),
            "layers": {
                name: [c.layer, c.density, c.candidates, c.choice, c.reason]
                for name, c in self.layers.items()
            },
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Selection:
        """raises: ValueError for what `state` never wrote."""
        try:
            layers = {
                str(name): LayerChoice(
                    str(c[0]),
                    float(c[1]),
                    {str(k): float(v) for k, v in c[2].items()},
                    str(c[3]),
                    str(c[4]),
                )
                for name, c in state["layers"].items()
            }
            whole, apart = state["whole"], tuple(str(name) for name in state["apart"])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"Selection: Expected layers, apart and whole, got {error!r}"
            ) from error
        if whole not in ("native", DENSE):
            raise ValueError(f"Selection: {unknown_choice('whole', whole, ('native', DENSE))}")
        for choice in layers.values():
            parse_form(choice.choice)
        return cls(layers, whole, apart)


def parse_form(name: str) -> tuple[str, str, int] | None:
    """Structure, mode and vectors of a form's name; None for "dense".

    raises: ValueError for another name
    """
    if name == DENSE:
        return None
    parts = name.split("/")
    good = len(parts) == 3 and parts[1] in MODES and parts[2] in {str(w) for w in WIDTHS}
    if not good or parts[0] not in ("element", "vector(4)", "vector(8)", "vector(16)"):
        raise ValueError(f"Selection: Expected structure/mode/vectors, got {name!r}")
    return parts[0], parts[1], int(parts[2])


def form_name(form: Form) -> str:
    return f"{form.weight.structure}/{form.mode}/{form.vectors}"


def executor_of(graph: Graph, selection: Selection) -> NativeExecutor | DenseExecutor:
    """What runs the graph as selected.   graph: as `select` was given it"""
    if selection.whole == DENSE or why_not_native() is not None:
        return DenseExecutor(graph)
    merged = prepared(graph, selection.apart)
    forms = {}
    for node in merged.nodes:
        choice = selection.layers.get(node.name)
        if choice is None or choice.choice == DENSE or why_not(node, merged) is not None:
            continue
        forms[node.name] = _form_of(node, merged, choice.choice)
    return NativeExecutor(merged, forms)


def select(graph: Graph, mode: str = "measured") -> Selection:
    """Choose for each layer of a graph.

    mode:   "measured"; "sparse" and "dense" measure nothing
    raises: ValueError for another mode
    """
    if mode not in SELECT:
        raise ValueError(f"select: {unknown_choice('mode', mode, SELECT)}")
    choose = {"measured": _measure, "sparse": _sparse, "dense": _dense}[mode]
    if why_not_native() is not None:
        mode, choose = DENSE, _dense
    merged, apart = prepared(graph), set[str]()
    layers = {}
    for node in merged.nodes:
        if not packable(node, merged) or why_not(node, merged) is not None:
            continue
        layers[node.name] = choose(node, merged)
        if mode == "measured" and len(node.outputs) > 1:
            members = [n for n in graph.nodes if n.outputs[0] in node.outputs]
            alone = {member.name: choose(member, graph) for member in members}
            if sum(map(_seconds, alone.values())) < _seconds(layers[node.name]):
                layers |= alone
                apart.update(alone)
    selection = Selection(layers, DENSE if mode == "dense" else "native", tuple(sorted(apart)))
    return _weigh(graph, selection) if mode == "measured" and layers else selection


def _seconds(choice: LayerChoice) -> float:
    return choice.candidates[choice.choice]


def _dense(node: Node, graph: Graph) -> LayerChoice:
    reason = why_not_native() or "asked for"
    return LayerChoice(node.name, density(node.weights["weight"]), {}, DENSE, reason)


def _sparse(node: Node, graph: Graph) -> LayerChoice:
    name = form_name(_default(node, graph))
    return LayerChoice(node.name, density(node.weights["weight"]), {}, name, "asked for")


def _default(node: Node, graph: Graph) -> Form:
    structures = _structures(node, density(node.weights["weight"]))
    return default_form(node, graph, _packed(node, _unmeasured(structures)))


def _structures(node: Node, share: float) -> dict[str, float]:
    """Structures worth packing, and the weights that each stores for a live one."""
    groups = int(node.attrs.get("groups", 1))  # type: ignore[arg-type]
    found = structures_of(node.weights["weight"], groups)
    if share > _MOSTLY_LIVE and len(found) > 1:
        del found["element"]
    return found


def _unmeasured(structures: Mapping[str, float]) -> str:
    """The widest structure that stores few zeros; wider ones load less."""
    fitting = [name for name, fill in structures.items() if fill < _LITTLE_FILL]
    return fitting[-1] if fitting else next(iter(structures))


def _packed(node: Node, structure: str) -> PackedWeight:
    groups = int(node.attrs.get("groups", 1))  # type: ignore[arg-type]
    return pack_weight(node.weights["weight"], groups, structure)


def _form_of(node: Node, graph: Graph, name: str) -> Form:
    parsed = parse_form(name)
    assert parsed is not None
    structure, mode, vectors = parsed
    form = default_form(node, graph, _packed(node, structure))
    if native_module().isa() == "generic":
        vectors = form.vectors  # one width is all it has; a choice may come from another machine
    return Form(form.weight, mode, vectors, mode == "table" and _regions(form, node, graph))


def _regions(form: Form, node: Node, graph: Graph) -> bool:
    """As the default form has it, or would have it in table mode."""
    return form.regions if form.mode == "table" else regions_pay(node, graph)


def regions_pay(node: Node, graph: Graph) -> bool:
    """Whether ordering pixels by their taps would let tiles skip taps on padding."""
    if node.op != "conv2d":
        return False
    g = geometry_of(node)
    size = graph.shape(node.inputs[0])[2:]
    reach = [d * (k - 1) for d, k in zip(g.dilation, g.kernel, strict=True)]
    return g.stride == (1, 1) and any(4 * r > n for r, n in zip(reach, size, strict=True))


def _measure(node: Node, graph: Graph) -> LayerChoice:
    """Time a layer's candidates, or recall what was measured before."""
    weight = node.weights["weight"]
    share = density(weight)
    structures = _structures(node, share)
    key = _key(node, graph, share, structures)
    times = known_times(key)
    if times is None:
        times = remember_times(key, _time(node, graph, list(structures)))
    dense, sparse = times[DENSE], {k: t for k, t in times.items() if k != DENSE}
    first = next(iter(sparse))
    best = min(sparse, key=lambda name: sparse[name])
    if sparse[best] > MARGIN * sparse[first]:
        best = first
    if dense < MARGIN * sparse[best]:
        return LayerChoice(node.name, share, times, DENSE, f"{sparse[best] / dense:.2f}x faster")
    reason = f"{dense / sparse[best]:.2f}x as fast as dense"
    return LayerChoice(node.name, share, times, best, reason)


def _key(node: Node, graph: Graph, share: float, structures: Mapping[str, float]) -> str:
    """All that a layer's times depend on, but for the machine."""
    shapes = [list(graph.shape(name)) for name in node.inputs]
    geometry = sorted((k, v) for k, v in node.attrs.items() if k != "dynamic")
    bucket = density_bucket(share)
    where = f"{bucket}" if bucket is not None else f"dense {math.ceil(share * 10)}"
    kinds = {name: math.ceil(4 * fill) / 4 for name, fill in structures.items()}
    return f"{node.op} {shapes} {list(node.weights['weight'].shape)} {geometry} {where} {kinds}"


def _time(node: Node, graph: Graph, structures: list[str]) -> dict[str, float]:
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
        form = default_form(node, graph, _packed(node, structure))
        found.setdefault(form_name(form), form)
        others = ("table", "linear", "direct") if node.op == "conv2d" else ("table",)
        for mode in (form.mode, *(m for m in others if m != form.mode)):
            regions = mode == "table" and _regions(form, node, graph)
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


def _weigh(graph: Graph, selection: Selection) -> Selection:
    """Compare the whole graph in torch with what the layers chose, where that is in doubt."""
    measured = [c for c in selection.layers.values() if c.candidates]
    dense = sum(c.candidates[DENSE] for c in measured)
    native = sum(c.candidates[c.choice] for c in measured)
    if native < 0.7 * dense:  # conversions between layers are not that dear
        return selection
    whole, chosen = DenseExecutor(graph), executor_of(graph, selection)
    inputs = [torch.randn(graph.shape(name)) for name in graph.inputs]
    calls = {DENSE: lambda: whole(*inputs), "native": lambda: chosen(*inputs)}
    times = {name: t.best for name, t in interleave(calls, 3, 1, budget=4.0).items()}
    return replace(selection, whole=min(times, key=lambda name: times[name]))
