"""The device executor: the whole plan over torch's and our kernels, as one CUDA graph.

Values are channels_last in the target's type. A call copies its inputs into static buffers, unless
it was given those, launches the graph, and copies the outputs out, unless told not to. Everything
but the capture runs on a CPU too, where tests compare it with torch.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsemtl.engine.deferred import without_weights
from sparsemtl.engine.device_select import DeviceSelection, select_for_device
from sparsemtl.engine.executors.device_cast import Cast, DeviceWeights, cast_graph
from sparsemtl.engine.executors.torch import last_reads
from sparsemtl.engine.graph import Graph, Node, Value
from sparsemtl.engine.liveness import peak_bytes
from sparsemtl.engine.ops import compute
from sparsemtl.engine.target import Target
from sparsemtl.errors import GraphError
from sparsemtl.ops.availability import launch_errors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One call over named values, and the values that nobody reads after it."""

    call: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    drop: tuple[str, ...]


class DeviceExecutor:
    """Runs one graph on one device; safe to call from several threads and streams.

    graph:   weights anywhere, in the model's own type
    weights: shared with the engine's other plans
    """

    name = "device"

    def __init__(self, graph: Graph, target: Target, weights: DeviceWeights | None = None) -> None:
        self.device, self._copy_outputs = target.device, target.copy_outputs
        with torch.no_grad(), _on(self.device):
            cast = cast_graph(graph, target.device, target.dtype, weights or DeviceWeights())
            self.selection = select_for_device(cast.graph, target)
            self._program = Program(cast, self.selection)
            self.inputs = [_buffer(cast.graph.values[name], target.device) for name in graph.inputs]
            self._outputs: dict[str, Tensor] | None = None
            self._replay, self.why_not_captured = self._capture(target)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # callers come on streams of their own
        graphed = self.why_not_captured is None
        how = "as one graph" if graphed else f"call by call: {self.why_not_captured}"
        self.where = f"{self.device} in {target.dtype or cast.own}, {how}"
        sizes = sum(buffer.nbytes for buffer in self.inputs)
        self.peak_bytes = sizes + peak_bytes(cast.graph)
        self.cast = Cast(without_weights(cast.graph), cast.constants, cast.wide, cast.own)
        self._lock = threading.Lock()
        self._turns = _Turns(self.device)
        # Memory that is given back may be another's at once, while the device still works with it.
        weakref.finalize(self, self._turns.wait).atexit = False

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The graph's outputs.

        inputs:  as the graph declares them, floating ones in the model's type or the target's; a
                 tensor of `self.inputs` is not copied
        returns: contiguous tensors of the caller's own; or, without copying, those that the next
                 call writes to, channels_last
        """
        with self._lock, torch.no_grad(), _on(self.device), self._turns:
            for buffer, x in zip(self.inputs, inputs, strict=True):
                if not _same(buffer, x):
                    buffer.copy_(x)
            found = self._run()
            if not self._copy_outputs:
                return dict(found)
            return {
                task: value.clone(memory_format=torch.contiguous_format)
                for task, value in found.items()
            }

    def runs_as(self, node: Node) -> tuple[str, str, Mapping[str, float]]:
        """How a node runs, why, and the seconds of each form that was timed."""
        layer = self.selection.layers.get(node.name)
        if layer is not None:
            return layer.choice, layer.reason, layer.candidates
        if node.name in self.cast.wide:
            return "torch", f"torch's operator; it computes in {self.cast.own}", {}
        if node.op == "torch":
            return "torch", "no op of ours", {}
        if any(name in self.cast.constants for name in node.outputs):
            return "constant", "depends on no input", {}
        return "library", "torch's kernel for the device", {}

    def _run(self) -> dict[str, Tensor]:
        if self._replay is None:
            return self._program(self.inputs)
        self._replay()
        assert self._outputs is not None
        return self._outputs

    def _capture(self, target: Target) -> tuple[Callable[[], None] | None, str | None]:
        """What replays the program, or why it runs call by call."""
        if target.capture is None:
            return None, "no graph was asked for"
        # Torch's operators turn what they raise into the latter.
        errors: tuple[type[Exception], ...] = (*launch_errors(), GraphError)
        try:
            graph = target.capture(partial(self._program, self.inputs), self.device)
        except errors as error:
            reason = str(error).strip().partition("\n")[0]
            self._program(self.inputs)  # what fails outside of a graph too is no matter of capture
            log.warning("engine: runs call by call, it cannot be one CUDA graph: %s", reason)
            return None, reason
        self._program.after_capture()
        self._outputs = graph.result
        replay: Callable[[], None] = graph.replay
        return replay, None


class Program:
    """The calls of a graph in order, over values by name; nothing in it waits for the device."""

    def __init__(self, cast: Cast, selection: DeviceSelection) -> None:
        self.graph = cast.graph
        self._constants = {
            name: value for name, value in cast.constants.items() if name in _read(cast.graph)
        }
        self._launches = list(selection.branches.values())
        self.steps = _steps(cast, selection)

    def __call__(self, inputs: list[Tensor]) -> dict[str, Tensor]:
        """The graph's outputs.   inputs: on the device, of the types that the graph says"""
        values = dict(zip(self.graph.inputs, inputs, strict=True)) | self._constants
        for step in self.steps:
            found = step.call(*(values[name] for name in step.inputs))
            values.update(zip(step.outputs, found, strict=True))
            for name in step.drop:
                del values[name]
        return {task: values[name] for task, name in self.graph.outputs.items()}

    def after_capture(self) -> None:
        """Tell grouped launches the addresses that the capture gave their tensors."""
        for launch in self._launches:
            launch.after_capture()


def _steps(cast: Cast, selection: DeviceSelection) -> list[Step]:
    """Nodes and common launches, each as soon as its inputs are there."""
    units = _units(cast.graph, list(selection.branches))
    ordered = [node for unit in units for node in unit]
    arranged = Graph(ordered, cast.graph.values, cast.graph.inputs, cast.graph.outputs)
    drop = last_reads(arranged)
    keep = {*cast.constants}
    steps = []
    for unit in units:
        names = tuple(node.name for node in unit)
        call = selection.branches.get(names) or _call(unit[0], cast, selection)
        inputs = tuple(name for node in unit for name in node.inputs)
        outputs = tuple(name for node in unit for name in node.outputs)
        gone = tuple(n for name in names for n in drop.get(name, ()) if n not in keep)
        steps.append(Step(call, inputs, outputs, gone))
    return steps


def _units(graph: Graph, together: list[tuple[str, ...]]) -> list[list[Node]]:
    """Nodes that run in one step, in an order in which each finds what it reads."""
    nodes = {node.name: node for node in graph.nodes}
    home = {name: group for group in together for name in group}
    waiting: list[list[Node]] = []
    for node in graph.nodes:
        group = home.get(node.name, (node.name,))
        if group[0] == node.name:
            waiting.append([nodes[name] for name in group])
    written = {name for node in graph.nodes for name in node.outputs}
    units: list[list[Node]] = []
    while waiting:
        later = []
        for unit in waiting:
            if written.isdisjoint(name for node in unit for name in node.inputs):
                units.append(unit)
                written.difference_update(name for node in unit for name in node.outputs)
            else:
                later.append(unit)
        assert len(later) < len(waiting), "branches of one depth do not need each other"
        waiting = later
    return units


def _call(node: Node, cast: Cast, selection: DeviceSelection) -> Callable[..., tuple[Tensor, ...]]:
    form = selection.forms.get(node.name)
    if form is not None:
        return lambda *inputs: (form(*inputs),)
    if node.name not in cast.wide:
        return partial(compute, node)
    asked = cast.wide[node.name]
    given = [cast.graph.values[name].dtype for name in node.outputs]

    def wide(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = compute(node, *(x.to(kind) for x, kind in zip(inputs, asked, strict=True)))
        return tuple(y.to(kind) for y, kind in zip(found, given, strict=True))

    return wide


def _read(graph: Graph) -> set[str]:
    return {name for node in graph.nodes for name in node.inputs} | {*graph.outputs.values()}


def _buffer(value: Value, device: torch.device) -> Tensor:
    """A static input, zero so that the first runs meet no wild index."""
    found = torch.zeros(value.shape, dtype=value.dtype, device=device)
    return found.contiguous(memory_format=torch.channels_last) if found.dim() == 4 else found


def _same(buffer: Tensor, x: Tensor) -> bool:
    """Whether x is the buffer, through whatever tensor object."""
    return x is buffer or (
        x.data_ptr() == buffer.data_ptr()
        and x.dtype is buffer.dtype
        and x.stride() == buffer.stride()
        and x.device == buffer.device
    )


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


class _Turns:
    """Lets each call's work on the device wait for that of the call before, whatever its stream."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = torch.cuda.Event() if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def __exit__(self, *error: object) -> None:
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Wait until nothing runs any more."""
        if self._event is not None:
            self._event.synchronize()
