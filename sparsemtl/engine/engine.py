"""`compile` a finished model into an `Engine`: the same outputs, faster and smaller.

engine = sparsemtl.compile(model, torch.zeros(1, 3, 321, 321))
engine(image)["depth"]         # [B, 1, h, w]
engine.save("engine")          # a folder; Engine.load("engine") reads it
print(engine.explain())        # what runs how, and why
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsemtl.engine.choices import machine
from sparsemtl.engine.deferred import defer, densities, without_weights
from sparsemtl.engine.executor import EXECUTORS, Executor, OnDevice, Selected, make_executor
from sparsemtl.engine.executors.device_cast import DeviceWeights
from sparsemtl.engine.explain import Explanation, explain_plan
from sparsemtl.engine.file import load_graph, physical_memory, save_graph
from sparsemtl.engine.graph import Graph
from sparsemtl.engine.liveness import peak_bytes
from sparsemtl.engine.passes import adapt, optimise
from sparsemtl.engine.saved_choices import Choices, Shapes
from sparsemtl.engine.selection import Selection
from sparsemtl.engine.shapes import specialise
from sparsemtl.engine.target import Target, make_target
from sparsemtl.errors import unknown_choice

MOST_PLANS = 8


def compile(
    model: nn.Module,
    example: Tensor | Sequence[Tensor] | tuple[int, ...],
    *,
    executor: str = "auto",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    copy_outputs: bool = True,
    most_plans: int = MOST_PLANS,
    about: dict[str, Any] | None = None,
) -> Engine:
    """Capture a model in evaluation mode and prepare it for the example's input size.

    model:      any module that returns a dict of task → tensor (or one tensor, or several); one
                that `sparsify` changed needs no `finalize` first
    example:    an input, several, or the shape of one; values do not matter, shape, dtype and
                device do. Other input sizes are served too where the model's code allows it
    executor:   "auto": each layer natively or in torch, whichever was measured faster here;
                "native": the same, never falling back; "sparse": native, nothing measured;
                "torch": plain torch; "device": what GPUs run, one call after the other
    device:     "cuda": every layer as measured fastest there, all in one CUDA graph; default: that
                of the model
    dtype:      on a CUDA device, float32, bfloat16 or float16; default: the model's type
    copy_outputs: on a CUDA device, False: outputs are the graph's own, valid until the next call
    most_plans: input sizes whose plans are kept; the least recently used goes first
    about:      plain data that is saved with the engine, such as how images are normalised
    raises:     CaptureError (a ValueError) for control flow that depends on values, naming the
                line; BackendUnavailable for an executor or device that cannot run here
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile: Expected model to be a module, got {type(model).__name__}")
    if device is None and executor in ("auto", "device"):
        device = _home(model)
    target = make_target("compile", device, dtype, copy_outputs=copy_outputs)
    from sparsemtl.engine.capture import capture  # torch.export: slow to import, not for loading

    graph, found = optimise(capture(model, example_inputs(model, example)))
    _own_weights(graph, model)
    if target is not None:
        _to_cpu(graph)
    engine = Engine(
        graph, executor=executor, target=target, most_plans=most_plans, rewrites=found, about=about
    )
    engine.plan(*(graph.shape(name) for name in graph.inputs))
    return engine


class Plan:
    """A graph for one input size, with who runs it."""

    def __init__(
        self,
        graph: Graph,
        executor: str,
        choices: Mapping[tuple[str, Shapes], Selection],
        target: Target | None = None,
        weights: DeviceWeights | None = None,
    ) -> None:
        shapes = tuple(graph.shape(name) for name in graph.inputs)
        here = machine()
        graph, self.rewrites = adapt(graph)
        peak = peak_bytes(graph)
        if peak > _memory(target):
            sizes = [list(shape) for shape in shapes]
            raise ValueError(
                f"engine: Expected an input whose values fit the memory there is, got {sizes}, "
                f"which needs {peak} bytes"
            )
        known = choices.get((here, shapes))
        self.executor: Executor = make_executor(executor, graph, known, target, weights)
        self.timed: tuple[str, Selection] | None = None
        self.chosen = ""
        if isinstance(self.executor, Selected) and self.executor.measured:
            self.timed = here, self.executor.selection
            self.chosen = _origin(self.executor, here, shapes, choices)
        self.densities = densities(graph)
        self.graph = without_weights(graph)  # the executor has them in its own form

    @property
    def peak_bytes(self) -> int:
        """Memory for intermediate values in one call, reuse counted; weights are not in it."""
        return self.executor.peak_bytes


def _origin(
    executor: Selected, here: str, shapes: Shapes, choices: Mapping[tuple[str, Shapes], Selection]
) -> str:
    """Where choices come from, in words."""
    if executor.from_file:
        return f"of the engine's file, timed on this machine ({here})"
    others = sorted({machine for machine, known in choices if known == shapes and machine != here})
    if others:
        return f"timed here ({here}); the engine's file has those of {'; '.join(others)}"
    return f"timed here ({here})"


class Engine:
    """A compiled model: `engine(x)` → dict of task → tensor. Any number of threads may call it."""

    def __init__(
        self,
        graph: Graph,
        *,
        executor: str = "auto",
        target: Target | None = None,
        most_plans: int = MOST_PLANS,
        rewrites: dict[str, int] | None = None,
        about: dict[str, Any] | None = None,
        choices: Choices | None = None,
    ) -> None:
        if executor not in EXECUTORS:
            raise ValueError(f"engine: {unknown_choice('executor', executor, EXECUTORS)}")
        if most_plans < 1:
            raise ValueError(f"engine: Expected most_plans ≥ 1, got {most_plans}")
        self.graph = defer(graph)
        self._choices = dict(choices or {})
        self.rewrites = dict(rewrites or {})
        self.about = dict(about or {})
        self._executor, self._target = executor, target
        self._device_weights = DeviceWeights()
        self._most_plans = most_plans
        self._plans: OrderedDict[Shapes, Plan] = OrderedDict()
        self._lock = threading.Lock()
        devices = (w.device for node in self.graph.nodes for w in node.weights.values())
        self._device = next((d for d in devices if d.type != "meta"), torch.device("cpu"))
        if target is not None:
            self._device = target.device

    @property
    def tasks(self) -> list[str]:
        return list(self.graph.outputs)

    @property
    def input_shapes(self) -> list[tuple[int, ...]]:
        """The shapes that it was compiled with."""
        return [self.graph.shape(name) for name in self.graph.inputs]

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Predict every task.

        inputs:  as the example, in another size where the model allows it; contiguous is fastest
        returns: task → tensor, as the model returns it in evaluation mode; without gradients
        raises:  TypeError or ValueError naming expected and got, before anything runs
        """
        self._check(inputs)
        return self.plan(*(tuple(x.shape) for x in inputs)).executor(*inputs)

    def plan(self, *shapes: tuple[int, ...]) -> Plan:
        """The plan for inputs of these shapes, made at the first call for them.

        raises: ValueError naming the size that this model cannot take
        """
        with self._lock:
            if shapes in self._plans:
                self._plans.move_to_end(shapes)
                return self._plans[shapes]
            plan = Plan(
                specialise(self.graph, shapes),
                self._executor,
                self._choices,
                self._target,
                self._device_weights,
            )
            if plan.timed is not None:
                self._choices[plan.timed[0], shapes] = plan.timed[1]
            self._plans[shapes] = plan
            while len(self._plans) > self._most_plans:
                self._plans.popitem(last=False)
            return plan

    def input_buffer(self, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The tensors that a CUDA graph reads: write into them, call with them, nothing is copied.

        shapes:  default the example's
        returns: one for each input, in the target's type, channels_last; they live as long as the
                 plan of these shapes, and every call for these shapes writes to them
        raises:  ValueError for an engine of the CPU, which reads its caller's tensors
        """
        executor = self.plan(*(shapes or self.input_shapes)).executor
        if not isinstance(executor, OnDevice):
            raise ValueError(
                "engine: Expected an engine of a CUDA device for input_buffer, got one of the CPU"
            )
        return tuple(executor.run.inputs)

    def explain(self, *shapes: tuple[int, ...]) -> Explanation:
        """What runs how, layer by layer; `str` of it is a table.   shapes: default the example's"""
        return explain_plan(self.plan(*(shapes or self.input_shapes)), self.rewrites)

    def save(
        self, folder: str | os.PathLike[str], *, dtype: str = "float32", overwrite: bool = False
    ) -> None:
        """Write `plan.json` and `weights.safetensors` into a new folder, all of it or nothing.

        What was timed for the sizes in use is written too, so that loading it on this machine, with
        as many threads, times nothing.

        dtype:  "bfloat16" halves the values, rounded to 8 bits of precision
        raises: ValueError for a folder that holds something, or an operator of another library
        """
        with self._lock:
            choices = dict(self._choices)
        save_graph(
            self.graph,
            Path(folder),
            dtype=dtype,
            overwrite=overwrite,
            about=self.about,
            choices=choices,
        )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        executor: str = "auto",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        copy_outputs: bool = True,
        most_plans: int = MOST_PLANS,
    ) -> Engine:
        """Read what `save` wrote; everything is checked before anything runs.

        device, dtype, copy_outputs: as for `compile`
        raises: EngineFileError (a ValueError) naming what is wrong, an unknown version among it
        """
        target = make_target("Engine.load", device, dtype, copy_outputs=copy_outputs)
        graph, about, choices = load_graph(Path(folder))
        return cls(
            graph,
            executor=executor,
            target=target,
            most_plans=most_plans,
            about=about,
            choices=choices,
        )

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        names = self.graph.inputs
        if len(inputs) != len(names):
            raise TypeError(f"engine: Expected {len(names)} inputs {names}, got {len(inputs)}")
        for name, x in zip(names, inputs, strict=True):
            value = self.graph.values[name]
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"engine: Expected input {name!r} to be a tensor, got {type(x).__name__}"
                )
            kinds = self._kinds(value.dtype)
            if x.dtype not in kinds:
                wanted = " or ".join(map(str, kinds))
                raise TypeError(f"engine: Expected input {name!r} of dtype {wanted}, got {x.dtype}")
            if x.device != self._device:
                raise ValueError(
                    f"engine: Expected input {name!r} on {self._device}, got {x.device}"
                )
            if x.dim() == len(value.shape) == 4 and x.shape[1] != value.shape[1]:
                raise ValueError(
                    f"engine: Expected input {name!r} with {value.shape[1]} channels "
                    f"[B, {value.shape[1]}, H, W], got {list(x.shape)}"
                )

    def _kinds(self, declared: torch.dtype) -> tuple[torch.dtype, ...]:
        """Types that an input may have: its own, and on a device the one that is computed in."""
        dtype = None if self._target is None else self._target.dtype
        if dtype in (None, declared) or not declared.is_floating_point:
            return (declared,)
        return (declared, dtype)  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"Engine(tasks={self.tasks}, inputs={self.input_shapes})"


def _own_weights(graph: Graph, model: nn.Module) -> None:
    """Copy what is still the model's, so that training on does not change the engine."""
    tensors = [*model.parameters(), *model.buffers()]
    theirs = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    for node in graph.nodes:
        for name, weight in node.weights.items():
            if weight.untyped_storage().data_ptr() in theirs:
                node.weights[name] = weight.clone()


def _memory(target: Target | None) -> int:
    """Bytes that there are where values will be."""
    if target is None or target.device.type != "cuda":
        return physical_memory()
    return int(torch.cuda.get_device_properties(target.device).total_memory)


def _home(model: nn.Module) -> torch.device | None:
    """The model's CUDA device; None on any other."""
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    return found if found.type == "cuda" else None


def _to_cpu(graph: Graph) -> None:
    """Weights where they can be coded and saved; plans bring them to the device."""
    for node in graph.nodes:
        node.weights = {name: weight.cpu() for name, weight in node.weights.items()}


def example_inputs(
    model: nn.Module, example: Tensor | Sequence[Tensor] | tuple[int, ...]
) -> list[Tensor]:
    """The inputs that an example stands for.   raises: TypeError for anything else"""
    if isinstance(example, Tensor):
        return [example]
    items = list(example) if isinstance(example, list | tuple) else []
    if items and all(isinstance(x, Tensor) for x in items):
        return items  # type: ignore[return-value]
    if not items or not all(isinstance(n, int) and n > 0 for n in items):
        raise TypeError(
            f"compile: Expected example to be a tensor, tensors or a shape, got {example!r}"
        )
    like = next(model.parameters(), torch.zeros(0))
    return [torch.zeros(items, dtype=like.dtype, device=like.device)]  # type: ignore[arg-type]
