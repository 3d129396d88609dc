"""Operators that only torch knows: an ATen overload by name, its arguments as JSON.

A node of op `torch` has attributes
  target:    "aten::hardshrink.default", or an operator of another library (those are not saved)
  arguments: JSON, {"args": [...], "kwargs": {...}}. Numbers, booleans, strings, null and lists
             stand for themselves; {"input": i} is the node's i-th input, {"weight": name} one of
             its weights, {"float": "inf"} a number that JSON has not, {"dtype": "int64"},
             {"memory_format": ...}, {"layout": ...} and {"device": "cpu"} are torch's own.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemtl.errors import GraphError

if TYPE_CHECKING:
    from sparsemtl.engine.graph import Node

_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16")
_TORCH_NAMES = {
    "dtype": (*_DTYPES, "float32", "float64", "complex64", "complex128"),
    "memory_format": ("contiguous_format", "preserve_format", "channels_last"),
    "layout": ("strided",),
}
# Operators for torch's own use may trust their arguments; these do not.
_UNDERSCORED = (
    *("_adaptive_avg_pool2d", "_log_softmax", "_scaled_dot_product_flash_attention_for_cpu"),
    *("_softmax", "_to_copy", "_unsafe_view"),
)
# Views over memory by address or file, and memory without values.
_NOT_FROM_A_FILE = (
    *("as_strided", "as_strided_copy", "as_strided_scatter", "empty", "empty_like"),
    *("empty_permuted", "empty_strided", "from_file", "new_empty", "new_empty_strided"),
    *("resize", "resize_as", "set"),
)
_FLOATS = ("inf", "-inf", "nan")


def run(node: Node, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Call the operator; its tensors, in order.

    raises: GraphError if it refuses them, which torch may know only when it computes
    """
    device = next((t.device for t in (*inputs, *node.weights.values())), torch.device("cpu"))
    spec = json.loads(node.attrs["arguments"])
    args = [_decode(value, node, inputs, device) for value in spec["args"]]
    kwargs = {k: _decode(value, node, inputs, device) for k, value in spec["kwargs"].items()}
    target = node.attrs["target"]
    try:
        found = overload(target)(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError) as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise GraphError(
            f"engine: Expected arguments that {target} takes at {node.name!r}, got: {reason[0]}"
        ) from error
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def overload(target: str) -> Any:
    """The operator of a name such as "aten::add.Tensor".   raises: GraphError if there is none"""
    namespace, _, rest = target.partition("::")
    name, _, kind = rest.partition(".")
    packet = getattr(getattr(torch.ops, namespace, None), name, None) if name else None
    found = getattr(packet, kind, None) if packet is not None and kind else None
    if not isinstance(found, torch._ops.OpOverload):
        raise GraphError(f"torch: Expected target to name an operator, got {target!r}")
    return found


def may_be_saved(target: str) -> bool:
    """Whether a file may name this operator: torch's own, writing nothing but its result."""
    namespace, _, rest = target.partition("::")
    name = rest.partition(".")[0]
    if namespace != "aten" or name in _NOT_FROM_A_FILE:
        return False
    if name.startswith("_") and name not in _UNDERSCORED:
        return False
    try:
        return not overload(target)._schema.is_mutable
    except GraphError:
        return False


def check(node: Node) -> None:
    """raises: GraphError unless target and arguments are of the form above."""
    overload(node.attrs["target"])
    try:
        spec = json.loads(node.attrs["arguments"])
    except (json.JSONDecodeError, RecursionError) as error:
        raise GraphError(f"torch: Expected JSON arguments of {node.name!r}, got {error}") from error
    if not isinstance(spec, dict) or set(spec) != {"args", "kwargs"}:
        raise GraphError(f"torch: Expected args and kwargs of {node.name!r}, got {type(spec)}")
    if not isinstance(spec["args"], list) or not isinstance(spec["kwargs"], dict):
        raise GraphError(f"torch: Expected a list of args and a dict of kwargs of {node.name!r}")
    for value in (*spec["args"], *spec["kwargs"].values()):
        _check_argument(value, node)


def encode(value: Any) -> Any:
    """An argument that is no tensor, as JSON.   raises: TypeError for one that has no form"""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value - value == 0.0 else {"float": str(value)}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, torch.device):
        return {"device": "cpu"}  # the device of the node's tensors when it runs
    for kind in _TORCH_NAMES:
        name = str(value).removeprefix("torch.")
        if isinstance(value, getattr(torch, kind)) and name in _TORCH_NAMES[kind]:
            return {kind: name}
    raise TypeError(f"no form for {value!r}")


def _decode(value: Any, node: Node, inputs: tuple[Tensor, ...], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decode(item, node, inputs, device) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, what),) = value.items()
    if kind == "input":
        return inputs[what]
    if kind == "weight":
        return node.weights[what]
    if kind == "float":
        return float(what)
    return device if kind == "device" else getattr(torch, what)


def _check_argument(value: Any, node: Node) -> None:
    if isinstance(value, list):
        for item in value:
            _check_argument(item, node)
    if not isinstance(value, dict):
        return
    if len(value) == 1:
        ((kind, what),) = value.items()
        known = {
            "input": isinstance(what, int) and 0 <= what < len(node.inputs),
            "weight": isinstance(what, str) and what in node.weights,
            "float": what in _FLOATS,
            "device": what == "cpu",
            **{name: what in choices for name, choices in _TORCH_NAMES.items()},
        }
        if known.get(kind, False):
            return
    raise GraphError(f"torch: Expected a known argument of {node.name!r}, got {value!r}")
