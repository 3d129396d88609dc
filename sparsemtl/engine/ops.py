"""What each op of the engine's graph means: its attributes, its weights, and plain torch for it.

B: batch; C, K: channels in and out; H W, h w: map before and after; G: groups; R S: kernel.
Every image value is [B, C, H, W]. `OPS` at the end is the table. Whatever torch knows and this
table does not is an op `torch`, see `engine/aten.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemtl.engine import aten
from sparsemtl.engine.shape_rules import output_shape
from sparsemtl.errors import GraphError, unknown_choice

if TYPE_CHECKING:
    from sparsemtl.engine.graph import Node, Value

Compute = Callable[..., "Tensor | tuple[Tensor, ...]"]

ACTIVATIONS = ("", "relu", "relu6")
RESIZE_MODES = ("nearest", "bilinear")
MANY = 1 << 16  # more inputs than any node has
LARGEST = 1 << 31  # no size, stride or index is as large
MOST_BYTES = 1 << 42  # and no value has as many bytes


@dataclass(frozen=True)
class OpSpec:
    """One op.

    compute:  (node, *inputs) → its output, or a tuple of them
    inputs:   fewest and most inputs
    attrs:    name → a key of `KINDS`; all must be there
    weights:  constant tensors that it needs, and those that it may have
    """

    compute: Compute
    inputs: tuple[int, int] = (1, 1)
    attrs: dict[str, str] = field(default_factory=dict)
    weights: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def check_node(node: Node) -> None:
    """raises: GraphError unless op, attributes, weights and number of inputs fit `OPS`."""
    if node.op not in OPS:
        raise GraphError(f"Graph: {unknown_choice(f'op of {node.name!r}', node.op, OPS)}")
    spec = OPS[node.op]
    low, high = spec.inputs
    if not low <= len(node.inputs) <= high:
        raise GraphError(
            f"Graph: Expected {node.op} {node.name!r} to read {low} to {high} values, got "
            f"{len(node.inputs)}"
        )
    attrs = {name: value for name, value in node.attrs.items() if name != DYNAMIC}
    if set(attrs) != set(spec.attrs):
        raise GraphError(
            f"Graph: Expected attributes {sorted(spec.attrs)} of {node.op} {node.name!r}, got "
            f"{sorted(attrs)}"
        )
    for name, kind in spec.attrs.items():
        if not KINDS[kind](attrs[name]):
            raise GraphError(
                f"Graph: Expected {name} of {node.name!r} to be {kind}, got {attrs[name]!r}"
            )
    if node.op == "torch":
        aten.check(node)
    elif not set(spec.weights) <= set(node.weights) <= {*spec.weights, *spec.optional}:
        raise GraphError(
            f"Graph: Expected weights {spec.weights} and perhaps {spec.optional} of {node.name!r},"
            f" got {sorted(node.weights)}"
        )
    elif not _weights_agree(node):
        shapes = {name: list(weight.shape) for name, weight in node.weights.items()}
        raise GraphError(
            f"Graph: Expected weights of {node.op} {node.name!r} that agree, got {shapes}"
        )


def _weights_agree(node: Node) -> bool:
    """Whether a kernel or matrix has the axes of its op, and all else one entry per channel.

    torch finds some of this out only when it computes.
    """
    axes = {"conv2d": 4, "linear": 2, "batch_norm": 1}.get(node.op)
    if axes is None:
        return True
    main = "mean" if node.op == "batch_norm" else "weight"
    rows = node.weights[main].shape[:1]
    return node.weights[main].dim() == axes and all(
        weight.shape == rows for name, weight in node.weights.items() if name != main
    )


def infer_outputs(node: Node, inputs: Sequence[Value]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each output, found by torch itself on tensors without memory.

    raises: GraphError if the op cannot take these inputs
    """
    known = output_shape(node, inputs)
    if known is not None:
        return [(known, inputs[0].dtype)]
    shadow = node.copy()
    shadow.weights = {name: w.to("meta") for name, w in node.weights.items()}
    try:
        found = compute(
            shadow, *(torch.empty(v.shape, dtype=v.dtype, device="meta") for v in inputs)
        )
    except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise GraphError(
            f"Graph: Expected {node.op} {node.name!r} to take {[str(v) for v in inputs]}, got "
            f"{str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    return [(tuple(tensor.shape), tensor.dtype) for tensor in found]


def compute(node: Node, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run one node with plain torch: the meaning of the op."""
    found = OPS[node.op].compute(node, *inputs)
    return found if isinstance(found, tuple) else (found,)


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(x)
    return F.relu6(x) if activation == "relu6" else x


def _conv2d(node: Node, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """activation(conv(x) + bias + residual); weight [K, C/G, R, S], bias [K], residual as y."""
    a = node.attrs
    weight, bias = node.weights["weight"], node.weights.get("bias")
    y = F.conv2d(x, weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])
    return activate(_plus(y, residual), a["activation"])


def _linear(node: Node, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """activation(x Wᵀ + bias + residual); x [..., C], weight [K, C], bias [K]."""
    y = F.linear(x, node.weights["weight"], node.weights.get("bias"))
    return activate(_plus(y, residual), node.attrs["activation"])


def _plus(y: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return y
    if residual.shape != y.shape:
        raise ValueError(f"a residual of shape {list(residual.shape)} beside {list(y.shape)}")
    return y + residual


def _batch_norm(node: Node, x: Tensor) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias, per channel."""
    w = node.weights
    eps = node.attrs["eps"]
    return F.batch_norm(x, w["mean"], w["var"], w.get("weight"), w.get("bias"), eps=eps)


def _max_pool2d(node: Node, x: Tensor) -> Tensor:
    a = node.attrs
    return F.max_pool2d(
        x, a["kernel"], a["stride"], a["padding"], a["dilation"], ceil_mode=a["ceil_mode"]
    )


def _avg_pool2d(node: Node, x: Tensor) -> Tensor:
    a = node.attrs
    return F.avg_pool2d(
        x, a["kernel"], a["stride"], a["padding"], a["ceil_mode"], a["count_include_pad"]
    )


def _adaptive_avg_pool2d(node: Node, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, node.attrs["size"])


def _sum(node: Node, *inputs: Tensor) -> Tensor:
    total = inputs[0]
    for x in inputs[1:]:
        total = total + x
    return total


def _concat(node: Node, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, node.attrs["dim"])


def _resize(node: Node, x: Tensor) -> Tensor:
    """Resize [B, C, H, W] to `size`; the scale is that of the sizes."""
    a = node.attrs
    if a["mode"] == "nearest":
        return F.interpolate(x, a["size"], mode="nearest")
    return F.interpolate(x, a["size"], mode="bilinear", align_corners=a["align_corners"])


def _clamp(node: Node, x: Tensor) -> Tensor:
    return torch.clamp(x, node.attrs["min"], node.attrs["max"])


def _softmax(node: Node, x: Tensor) -> Tensor:
    return F.softmax(x, node.attrs["dim"])


def _argmax(node: Node, x: Tensor) -> Tensor:
    return x.argmax(node.attrs["dim"], node.attrs["keepdim"])


def _flatten(node: Node, x: Tensor) -> Tensor:
    return x.flatten(node.attrs["start"], node.attrs["end"])


def _reshape(node: Node, x: Tensor) -> Tensor:
    return x.reshape(node.attrs["shape"])


def _mean(node: Node, x: Tensor) -> Tensor:
    return x.mean(node.attrs["dims"], node.attrs["keepdim"])


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def _integers(low: int, count: int | None) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return (
            isinstance(value, tuple)
            and (count is None or len(value) == count)
            and all(_integer(n) and n >= low for n in value)
        )

    return check


KINDS: dict[str, Callable[[Any], bool]] = {
    "a positive pair": _integers(1, 2),
    "a pair of integers ≥ 0": _integers(0, 2),
    "integers": _integers(1 - LARGEST, None),
    "an integer": _integer,
    "a positive integer": lambda value: _integer(value) and value >= 1,
    "a number": lambda value: isinstance(value, float) or _integer(value),
    "true or false": lambda value: isinstance(value, bool),
    "text": lambda value: isinstance(value, str),
    "an activation": lambda value: isinstance(value, str) and value in ACTIVATIONS,
    "a resize mode": lambda value: isinstance(value, str) and value in RESIZE_MODES,
}

DYNAMIC = "dynamic"  # an attribute that any node may have: how others follow from the input sizes

_CONV = {
    "stride": "a positive pair",
    "padding": "a pair of integers ≥ 0",
    "dilation": "a positive pair",
    "groups": "a positive integer",
    "activation": "an activation",
}
_POOL = {
    "kernel": "a positive pair",
    "stride": "a positive pair",
    "padding": "a pair of integers ≥ 0",
    "ceil_mode": "true or false",
}
_KEPT = {"keepdim": "true or false"}

OPS: dict[str, OpSpec] = {
    "conv2d": OpSpec(_conv2d, (1, 2), _CONV, ("weight",), ("bias",)),
    "linear": OpSpec(_linear, (1, 2), {"activation": "an activation"}, ("weight",), ("bias",)),
    "batch_norm": OpSpec(
        _batch_norm, attrs={"eps": "a number"}, weights=("mean", "var"), optional=("weight", "bias")
    ),
    "max_pool2d": OpSpec(_max_pool2d, attrs={**_POOL, "dilation": "a positive pair"}),
    "avg_pool2d": OpSpec(_avg_pool2d, attrs={**_POOL, "count_include_pad": "true or false"}),
    "adaptive_avg_pool2d": OpSpec(_adaptive_avg_pool2d, attrs={"size": "a positive pair"}),
    "add": OpSpec(lambda node, x, y: x + y, (2, 2)),
    "sum": OpSpec(_sum, (1, MANY)),
    "mul": OpSpec(lambda node, x, y: x * y, (2, 2)),
    "concat": OpSpec(_concat, (1, MANY), {"dim": "an integer"}),
    "resize": OpSpec(
        _resize,
        attrs={
            "mode": "a resize mode",
            "align_corners": "true or false",
            "size": "a positive pair",
        },
    ),
    "relu": OpSpec(lambda node, x: F.relu(x)),
    "relu6": OpSpec(lambda node, x: F.relu6(x)),
    "clamp": OpSpec(_clamp, attrs={"min": "a number", "max": "a number"}),
    "sigmoid": OpSpec(lambda node, x: torch.sigmoid(x)),
    "silu": OpSpec(lambda node, x: F.silu(x)),
    "hardswish": OpSpec(lambda node, x: F.hardswish(x)),
    "softmax": OpSpec(_softmax, attrs={"dim": "an integer"}),
    "argmax": OpSpec(_argmax, attrs={"dim": "an integer", **_KEPT}),
    "identity": OpSpec(lambda node, x: x),
    "flatten": OpSpec(_flatten, attrs={"start": "an integer", "end": "an integer"}),
    "reshape": OpSpec(_reshape, attrs={"shape": "integers"}),
    "mean": OpSpec(_mean, attrs={"dims": "integers", **_KEPT}),
    "torch": OpSpec(aten.run, (0, MANY), {"target": "text", "arguments": "text"}),
}
