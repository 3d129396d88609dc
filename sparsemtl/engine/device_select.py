"""Which form each convolution takes on a device, and which run in one launch: by timing there.

On a CUDA device every candidate is timed as it will run, inside a CUDA graph, by the device's own
clock. A candidate is timed only after its result has agreed with the dense one. Times are kept in
the machine's file (`choices.py`) by device, type, shape, geometry and share of live blocks.

Convolutions of equal shapes that do not depend on each other, such as the branches of all heads,
may go into one launch of the block kernel, where that beats the sum of what each chose alone.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsemtl.cuda_graph import CudaGraph, graph_seconds
from sparsemtl.engine.choices import Times, known_times, remember_times
from sparsemtl.engine.executors.device_candidates import (
    DENSE,
    Layer,
    candidates,
    look_at,
    tiles_for,
    why_not_blocks,
)
from sparsemtl.engine.executors.device_forms import Blocks, Branches, Dense, Form
from sparsemtl.engine.graph import Graph
from sparsemtl.engine.selection import LayerChoice
from sparsemtl.engine.target import Target
from sparsemtl.ops.availability import INTERPRETING, launch_errors
from sparsemtl.ops.block_pattern import BlockPattern
from sparsemtl.ops.sparse_conv2d_triton import Tile
from sparsemtl.sparsity.choice import machine_key
from sparsemtl.timing import interleave

log = logging.getLogger(__name__)

Call = Callable[..., "Tensor | tuple[Tensor, ...]"]
MARGIN = 0.97  # of dense; the device's clock is steadier than a CPU's
REPEATS = 10  # runs in one graph: a single kernel is as short as the clock's steps
ROUNDS, BUDGET = 3, 0.5  # on a CPU, where this only serves tests
# How far from the dense result a candidate may be, as a share of its largest value: sums are
# grouped otherwise, and each rounds its result once.
AGREES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
AGREES_TF32 = 5e-3


@dataclass(frozen=True)
class DeviceSelection:
    """What runs each convolution.

    forms:    by node, of those that run by themselves
    branches: names of the nodes → their common launch
    layers:   node → candidates, choice and reason
    """

    forms: dict[str, Form]
    branches: dict[tuple[str, ...], Branches]
    layers: dict[str, LayerChoice]


def select_for_device(graph: Graph, target: Target) -> DeviceSelection:
    """Choose for every convolution of a graph whose weights are on the device."""
    layers = {node.name: look_at(node, graph) for node in graph.nodes if node.op == "conv2d"}
    forms: dict[str, Form] = {}
    choices: dict[str, LayerChoice] = {}
    for name, layer in layers.items():
        offered = candidates(layer)
        choices[name] = _choose(layer, offered, target)
        forms[name] = offered[choices[name].choice]()
    branches: dict[tuple[str, ...], Branches] = {}
    for members in _alike(graph, layers):
        names = tuple(layer.node.name for layer in members)
        grouped = _grouped(members, choices, target)
        if grouped is not None:
            branches[names], decided = grouped
            choices |= {name: decided(choices[name]) for name in names}
    for names in branches:
        for name in names:
            del forms[name]
    return DeviceSelection(forms, branches, choices)


def _choose(layer: Layer, offered: Mapping[str, Callable[[], Form]], target: Target) -> LayerChoice:
    name = layer.node.name
    if len(offered) == 1:
        return LayerChoice(name, layer.live, {}, DENSE, _nothing_to_gain(layer))
    key = f"{layer.key} {' '.join(offered)}"

    def measure() -> Times:
        inputs = _inputs(layer, target.device)
        return _measure(name, offered, inputs, [Dense(layer.node)(*inputs)], target)

    times = _known_or(key, measure, target)
    if DENSE not in times:
        return LayerChoice(name, layer.live, {}, DENSE, "nothing could be timed")
    best = min(times, key=lambda kind: times[kind])
    if best != DENSE and times[best] > MARGIN * times[DENSE]:
        best = DENSE
    return LayerChoice(name, layer.live, times, best, _because(best, times))


def _nothing_to_gain(layer: Layer) -> str:
    if layer.live > 0.95 and layer.inside > 0.95:
        return "no zeros to use"
    return why_not_blocks(layer) or "no blocks of zeros to use"


def _because(best: str, times: Times) -> str:
    if best != DENSE:
        return f"{times[DENSE] / times[best]:.2f}x as fast as dense"
    others = [t for kind, t in times.items() if kind != DENSE]
    return f"{min(others) / times[DENSE]:.2f}x faster" if others else "no other gave its result"


def _alike(graph: Graph, layers: Mapping[str, Layer]) -> list[list[Layer]]:
    """Convolutions that one launch could run: independent, alike but for rate and padding."""
    found: dict[Any, list[Layer]] = {}
    depths = depths_of(graph)
    for name, layer in layers.items():
        node, a = layer.node, layer.node.attrs
        shapes = tuple(graph.shape(v) for v in (*node.inputs, *node.outputs))
        weight, bias = node.weights["weight"], "bias" in node.weights
        kind = (a["stride"], a["groups"], a["activation"], bias, weight.dtype, tuple(weight.shape))
        found.setdefault((depths[name], shapes, kind), []).append(layer)
    return [members for members in found.values() if len(members) > 1]


def depths_of(graph: Graph) -> dict[str, int]:
    """Node → the longest way to it from the inputs; nodes of one depth do not need each other."""
    of_value = dict.fromkeys(graph.inputs, 0)
    found = {}
    for node in graph.nodes:
        found[node.name] = 1 + max((of_value.get(name, 0) for name in node.inputs), default=0)
        of_value.update(dict.fromkeys(node.outputs, found[node.name]))
    return found


def _grouped(
    members: Sequence[Layer], choices: Mapping[str, LayerChoice], target: Target
) -> tuple[Branches, Callable[[LayerChoice], LayerChoice]] | None:
    """The common launch of some layers, and what it makes of their choices; None: each alone."""
    alone = [choices[layer.node.name] for layer in members]
    if any(not c.candidates for c in alone) or any(why_not_blocks(m) for m in members):
        return None
    offered = _launches(members, choices)
    key = _digest([layer.key for layer in members], list(offered))
    seconds = sum(c.candidates[c.choice] for c in alone)

    def measure() -> Times:
        own = [_inputs(layer, target.device) for layer in members]
        expected = [Dense(m.node)(*inputs) for m, inputs in zip(members, own, strict=True)]
        flat = [x for inputs in own for x in inputs]
        return _measure(f"{members[0].node.name} and others", offered, flat, expected, target)

    times = _known_or(key, measure, target)
    if not times or min(times.values()) > MARGIN * seconds:
        return None
    best = min(times, key=lambda kind: times[kind])
    why = f"{len(members)} branches in one launch, {seconds / times[best]:.2f}x as fast as apart"

    def decided(choice: LayerChoice) -> LayerChoice:
        shared = {**choice.candidates, best: times[best] / len(members)}
        return LayerChoice(choice.layer, choice.density, shared, best, why)

    return offered[best](), decided


def _launches(
    members: Sequence[Layer], choices: Mapping[str, LayerChoice]
) -> dict[str, Callable[[], Branches]]:
    """Common launches by tile; each member walks the blocks that suit it best by itself."""
    sides = [_side(layer, choices[layer.node.name]) for layer in members]
    walked = [side for side in sides if side is not None]
    first = members[0].node
    groups = int(first.attrs["groups"])
    patterns = [
        BlockPattern(m.node.weights["weight"], groups, None if side is None else (side, side))
        for m, side in zip(members, sides, strict=True)
    ]
    smallest = patterns[sides.index(min(walked))] if walked else patterns[0]
    kind = f"together block{min(walked)}" if walked else "together skip"

    def launch(tile: Tile) -> Branches:
        own = [Blocks(m.node, p, tile) for m, p in zip(members, patterns, strict=True)]
        return Branches(own, len(first.inputs))

    return {
        f"{kind} {tile.pixels}x{tile.dest}x{tile.source}": partial(launch, tile)
        for tile in tiles_for(first, smallest)
    }


def _side(layer: Layer, choice: LayerChoice) -> int | None:
    """The side of the blocks that were fastest for a layer alone; None: it has none."""
    blocks = {k: t for k, t in choice.candidates.items() if k.startswith("block")}
    if not blocks:
        return None
    best = min(blocks, key=lambda kind: blocks[kind])
    return int(best.split()[0].removeprefix("block"))


def _inputs(layer: Layer, device: torch.device) -> list[Tensor]:
    values = [layer.graph.values[name] for name in layer.node.inputs]
    last = torch.channels_last
    return [
        torch.randn(v.shape, device=device).to(v.dtype).contiguous(memory_format=last)
        for v in values
    ]


def _checked(
    what: str, make: Callable[[], Call], inputs: Sequence[Tensor], expected: Sequence[Tensor]
) -> Callable[[], object] | None:
    """The form on these inputs, if it can run here and is right; else a warning says why not."""
    try:
        form = make()
        results = form(*inputs)
    except launch_errors() as error:
        log.warning("%s cannot run here: %s", what, str(error).strip().partition("\n")[0])
        return None
    found = results if isinstance(results, tuple) else (results,)
    kind = expected[0].dtype
    tf32 = kind is torch.float32 and expected[0].is_cuda and torch.backends.cudnn.allow_tf32
    limit = AGREES_TF32 if tf32 else AGREES[kind]
    for y, wanted in zip(found, expected, strict=True):
        apart = float((y.float() - wanted.float()).abs().max())
        size = float(wanted.float().abs().max())
        if not apart <= limit * size:
            log.warning("%s is left out: it differs from torch by %.1e of %.1e", what, apart, size)
            return None
    return _Bound(form, inputs)


class _Bound:
    """A form with its inputs; what it must do after a capture stays with it."""

    def __init__(self, form: Call, inputs: Sequence[Tensor]) -> None:
        self.form, self.inputs = form, list(inputs)

    def __call__(self) -> object:
        return self.form(*self.inputs)


def _known_or(key: str, measure: Callable[[], Times], target: Target) -> Times:
    """What this machine's file says, or is told now; another clock's times are nobody else's."""
    if target.clock is not None:
        return measure()
    machine = _machine(target.device)
    known = known_times(key, machine)
    if known is not None:
        return known
    found = measure()
    return remember_times(key, found, machine) if found else found


def _measure(
    what: str,
    offered: Mapping[str, Callable[[], Call]],
    inputs: Sequence[Tensor],
    expected: Sequence[Tensor],
    target: Target,
) -> Times:
    """Seconds of each candidate that runs here and gives the dense result."""
    calls = {}
    for kind, make in offered.items():
        call = _checked(f"{what} as {kind}", make, inputs, expected)
        if call is not None:
            calls[kind] = call
    return (target.clock or _seconds)(calls, target.device)


def _seconds(calls: Mapping[str, Callable[[], object]], device: torch.device) -> Times:
    """Seconds of one run of each; those that cannot be captured are left out."""
    if not calls:
        return {}
    if device.type != "cuda":
        found = interleave(calls, ROUNDS, 1, budget=BUDGET)
        return {name: t.best for name, t in found.items()}
    graphs: dict[str, CudaGraph] = {}
    for name, call in calls.items():
        try:
            graphs[name] = CudaGraph(partial(_repeat, call), device)
        except launch_errors() as error:
            log.warning("%s cannot be captured: %s", name, str(error).partition("\n")[0])
            continue
        form = call.form if isinstance(call, _Bound) else None
        if isinstance(form, Branches):
            form.after_capture()
    return {name: s / REPEATS for name, s in graph_seconds(graphs, device).items()}


def _repeat(call: Callable[[], object]) -> None:
    for _ in range(REPEATS):
        call()


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{machine_key()}{', interpreter' if INTERPRETING else ''}, device executor"


def _digest(*parts: Sequence[str]) -> str:
    text = "\n".join("\n".join(part) for part in parts)
    return f"together {hashlib.sha256(text.encode()).hexdigest()[:24]}"
