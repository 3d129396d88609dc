"""From a module to the engine's graph, by `torch.export`: of ours, or anyone's.

The capture keeps input sizes open where the model lets it: its sizes become formulas over the
input's, and what it decided by comparing sizes becomes guards (`Freedom`). A model that cannot be
captured so is captured for the example's sizes alone.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx.experimental import _config as fx_config

from sparsemtl.engine.builder import build_graph
from sparsemtl.engine.capture_errors import (
    CaptureError,
    cannot_export,
    explain_failure,
    from_the_model,
)
from sparsemtl.engine.expression import evaluate, sizes_of, symbol
from sparsemtl.engine.graph import Freedom, Graph

log = logging.getLogger(__name__)

_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_NO_LIMIT = 1 << 31


def capture(model: nn.Module, example: Sequence[Tensor]) -> Graph:
    """The graph of a model in evaluation mode; the model is left as it was.

    model:   returns a dict of task → tensor; also one tensor (task "output"), several (tasks
             "output0", "output1", ...), or a dataclass or named tuple, by its fields; names of what
             is nested are joined by dots
    example: its positional inputs, of the dtype and on the device that it will be used with
    raises:  CaptureError (a ValueError) for control flow that depends on values, naming the line;
             what the model itself raises for an input that it does not take
    """
    inputs = tuple(example)
    with inference(model), _plain_outputs(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own deprecated parts
        exported = _export(model, inputs)
        freedom = _freedom(exported, inputs)
        if _mutates(exported):
            with _oblivious():
                exported = exported.run_decompositions({})  # writes in place become new values
        try:
            return build_graph(exported, inputs, freedom)
        except CaptureError:
            if not freedom.sizes:
                raise
        # A formula that has no form here: the example's own sizes need none.
        return build_graph(_export(model, inputs, dynamic=False), inputs, Freedom())


def _export(model: nn.Module, inputs: tuple[Tensor, ...], dynamic: bool = True) -> Any:
    shapes = None
    if dynamic:
        auto = torch.export.Dim.AUTO
        shapes = tuple(dict.fromkeys(range(x.dim()), auto) for x in inputs)
    try:
        with _oblivious(), torch.no_grad(), _quiet():
            return torch.export.export(
                model, inputs, dynamic_shapes=_as_signature(model, shapes), strict=False
            )
    except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as error:
        if (failure := explain_failure(error)) is not None:
            raise failure from error
        if dynamic:
            log.info("captured for these sizes alone: %s", str(error).splitlines()[:1])
            return _export(model, inputs, dynamic=False)
        if from_the_model(error):
            raise
        raise cannot_export(error) from error


def _oblivious() -> Any:
    """An example of batch 1 stands for any batch; only the model's own comparisons pin it."""
    return fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]


def _as_signature(model: nn.Module, shapes: tuple[Any, ...] | None) -> Any:
    """Shapes nested as `forward` takes its arguments: *args hold theirs in one more tuple."""
    if shapes is None:
        return None
    parameters = list(inspect.signature(model.forward).parameters.values())
    for place, parameter in enumerate(parameters):
        if parameter.kind is parameter.VAR_POSITIONAL and place < len(shapes):
            return (*shapes[:place], tuple(shapes[place:]))
    return shapes


def _freedom(exported: Any, inputs: tuple[Tensor, ...]) -> Freedom:
    """Which sizes stayed open, in which range, under which guards."""
    specs = exported.graph_signature.input_specs
    users = [s.arg.name for s in specs if s.kind is InputKind.USER_INPUT]
    index = {name: i for i, name in enumerate(users)}
    guards = getattr(exported, "_guards_code", None)
    if guards is None:  # a torch that does not tell what it decided by comparing sizes
        return Freedom()
    sizes: dict[str, tuple[int, int]] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in index:
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and not size.node.expr.is_Integer:
                    limits = exported.range_constraints.get(size.node.expr)
                    if limits is None or not size.node.expr.is_Symbol:
                        return Freedom()
                    high = int(limits.upper) if limits.upper < _NO_LIMIT else -1
                    sizes[symbol(index[node.name], dim)] = (max(1, int(limits.lower)), high)
    try:
        written = [_SIZE.sub(lambda m: symbol(index[m[1]], int(m[2])), text) for text in guards]
        at_example = sizes_of([tuple(x.shape) for x in inputs])
        if not all(evaluate(text, at_example) for text in written):
            return Freedom()
    except (KeyError, ValueError):  # a guard that is no formula
        return Freedom()
    return Freedom(sizes, tuple(written))


def _mutates(exported: Any) -> bool:
    return any(
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        for node in exported.graph.nodes
    )


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and nothing in place where a module leaves the choice; then as before."""
    saved = [
        (module, module.training, getattr(module, "inplace", None)) for module in model.modules()
    ]
    try:
        for module, _, inplace in saved:
            module.training = False
            if inplace is True:
                module.inplace = False  # type: ignore[assignment]  # a plain bool
        yield
    finally:
        for module, training, inplace in saved:
            module.training = training
            if inplace is True:
                module.inplace = True  # type: ignore[assignment]


@contextmanager
def _plain_outputs(model: nn.Module) -> Iterator[None]:
    """Let the model return dicts in place of dataclasses and named tuples, unknown to torch."""
    forward, own = model.forward, "forward" in vars(model)

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return _plain(forward(*args, **kwargs))

    model.forward = plain
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {name: _plain(part) for name, part in fields.items() if part is not None}
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """torch prints the graph of a failed export; what it means is in our error."""
    shapes = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = shapes.disabled
    shapes.disabled = True
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        shapes.disabled = before
