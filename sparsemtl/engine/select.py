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
from collections.abc import Mapping
from dataclasses import replace

import torch

from sparsemtl.engine.choices import known_times, remember_times
from sparsemtl.engine.deferred import density
from sparsemtl.engine.executors.dense import DenseExecutor
from sparsemtl.engine.executors.forms import Form, default_form
from sparsemtl.engine.executors.native import NativeExecutor, packable, prepared
from sparsemtl.engine.executors.support import why_not
from sparsemtl.engine.graph import Graph, Node
from sparsemtl.engine.pack import structures_of
from sparsemtl.engine.selection import DENSE, LayerChoice, Selection, form_name, parse_form
from sparsemtl.engine.time_layer import packed, regions_of, time_layer
from sparsemtl.errors import unknown_choice
from sparsemtl.ops.availability import native_module, why_not_native
from sparsemtl.sparsity.choice import density_bucket
from sparsemtl.timing import interleave

SELECT = ("measured", "sparse", "dense")
_MOSTLY_LIVE = 0.6  # share of live weights from which on rows gain by sharing their loads
_LITTLE_FILL = 1.1
MARGIN = 0.95  # another candidate than the default must be this much faster


def executor_of(graph: Graph, selection: Selection) -> NativeExecutor | DenseExecutor:
    """What runs the graph as selected.   graph: as `select` was given it"""
    if selection.whole == DENSE or why_not_native() is not None:
        return DenseExecutor(graph)
    merged = prepared(graph, selection.apart)
    forms = {}
    for node in merged.nodes:
        choice = selection.layers.get(node.name)
        if choice is None or choice.choice == DENSE or not _selectable(node, merged):
            continue
        forms[node.name] = _form_of(node, merged, choice.choice)
        forms[node.name].settle(node, merged)
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
        if not _selectable(node, merged):
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


def fits(selection: Selection, graph: Graph) -> bool:
    """Whether a selection from a file chooses for all layers of this graph."""
    if selection.whole == DENSE or why_not_native() is not None:
        return selection.whole == DENSE
    merged = prepared(graph, selection.apart)
    return all(node.name in selection.layers for node in merged.nodes if _selectable(node, merged))


def _selectable(node: Node, graph: Graph) -> bool:
    return packable(node, graph) and why_not(node, graph) is None


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
    return default_form(node, graph, packed(node, _unmeasured(structures)))


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


def _form_of(node: Node, graph: Graph, name: str) -> Form:
    parsed = parse_form(name)
    assert parsed is not None
    structure, mode, vectors = parsed
    form = default_form(node, graph, packed(node, structure))
    if native_module().isa() == "generic":
        vectors = form.vectors  # one width is all it has; a choice may come from another machine
    return Form(form.weight, mode, vectors, mode == "table" and regions_of(form, node, graph))


def _measure(node: Node, graph: Graph) -> LayerChoice:
    """Time a layer's candidates, or recall what was measured before."""
    weight = node.weights["weight"]
    share = density(weight)
    structures = _structures(node, share)
    key = _key(node, graph, share, structures)
    times = known_times(key)
    if times is None:
        times = remember_times(key, time_layer(node, graph, list(structures)))
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
