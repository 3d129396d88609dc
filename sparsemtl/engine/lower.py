"""From torch's operators to ours: one function per kind, chosen by the operator's name.

A rule gets the operator's arguments by name and returns what the node is, or None where our op
does not cover this call: then the node stays torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from torch import Tensor


@dataclass(frozen=True)
class Read:
    """A runtime value among an operator's arguments."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """A size that follows from the input's sizes.   hint: its value for the example"""

    formula: str
    hint: int


@dataclass
class Lowered:
    """What a torch operator is in our terms; `sizes`: attributes whose items may be `Size`."""

    op: str
    inputs: list[Read]
    attrs: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, list[int | Size]] = field(default_factory=dict)


Arguments = dict[str, Any]
Shape = Callable[[], list[int | Size]]  # the output's; formulas are made only when asked for
Rule = Callable[[Arguments, Shape], "Lowered | None"]


def lower(target: Any, arguments: Arguments, shape: Shape) -> Lowered | None:
    """Our op for a call of `target`, or None.

    arguments: by the schema's names; runtime values as `Read`, sizes as `Size`, constants as are
    shape:     gives the shape of the (first) output
    """
    rule = RULES.get(str(target))
    return None if rule is None else rule(arguments, shape)


def _pair(value: Any) -> tuple[int, int] | None:
    items = list(value) if isinstance(value, list | tuple) else [value]
    if len(items) == 1:
        items *= 2
    if len(items) != 2 or not all(isinstance(n, int) for n in items):
        return None
    return items[0], items[1]


def _image(value: Any) -> TypeGuard[Read]:
    return isinstance(value, Read) and len(value.shape) == 4


def _constant(value: Any, dims: int) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == dims


def _bias(value: Any) -> dict[str, Tensor] | None:
    if value is None:
        return {}
    return {"bias": value} if _constant(value, 1) else None


def _conv2d(a: Arguments, shape: Shape) -> Lowered | None:
    x, weight, bias = a["input"], a["weight"], _bias(a["bias"])
    if a.get("transposed") or not _image(x) or not _constant(weight, 4) or bias is None:
        return None
    stride, dilation = _pair(a["stride"]), _pair(a["dilation"])
    padding = _pair(a["padding"])
    if a["padding"] == "valid":
        padding = (0, 0)
    elif a["padding"] == "same" and dilation is not None:
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = None if any(n % 2 for n in total) else (total[0] // 2, total[1] // 2)
    if stride is None or padding is None or dilation is None or min(padding) < 0:
        return None
    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": a["groups"]}
    return Lowered("conv2d", [x], {**attrs, "activation": ""}, {"weight": weight, **bias})


def _linear(a: Arguments, shape: Shape) -> Lowered | None:
    bias = _bias(a["bias"])
    if not isinstance(a["input"], Read) or not _constant(a["weight"], 2) or bias is None:
        return None
    return Lowered("linear", [a["input"]], {"activation": ""}, {"weight": a["weight"], **bias})


def _matmul(a: Arguments, shape: Shape) -> Lowered | None:
    x, weight = a.get("mat1", a["self"]), a.get("mat2", a.get("other"))
    if not isinstance(x, Read) or len(x.shape) < 2 or not _constant(weight, 2):
        return None
    bias = {} if "mat1" not in a else _bias(a["self"])
    if bias is None or a.get("beta", 1) != 1 or a.get("alpha", 1) != 1:
        return None
    return Lowered("linear", [x], {"activation": ""}, {"weight": weight.t().contiguous(), **bias})


def _batch_norm(a: Arguments, shape: Shape) -> Lowered | None:
    statistics = {"mean": a["running_mean"], "var": a["running_var"]}
    scale = {name: a[name] for name in ("weight", "bias") if a[name] is not None}
    weights = {**statistics, **scale}
    if a.get("training") or not isinstance(a["input"], Read):
        return None
    if not all(_constant(w, 1) for w in weights.values()):
        return None
    return Lowered("batch_norm", [a["input"]], {"eps": float(a["eps"])}, weights)


def _max_pool2d(a: Arguments, shape: Shape) -> Lowered | None:
    dilation = _pair(a["dilation"])
    pool = _pool(a)
    if pool is None or dilation is None:
        return None
    return Lowered("max_pool2d", [a["self"]], {**pool, "dilation": dilation})


def _avg_pool2d(a: Arguments, shape: Shape) -> Lowered | None:
    pool = _pool(a)
    if pool is None or a["divisor_override"] is not None:
        return None
    attrs = {**pool, "count_include_pad": a["count_include_pad"]}
    return Lowered("avg_pool2d", [a["self"]], attrs)


def _pool(a: Arguments) -> dict[str, Any] | None:
    kernel, padding = _pair(a["kernel_size"]), _pair(a["padding"])
    stride = _pair(a["stride"]) if a["stride"] else kernel
    if not _image(a["self"]) or kernel is None or stride is None or padding is None:
        return None
    return {"kernel": kernel, "stride": stride, "padding": padding, "ceil_mode": a["ceil_mode"]}


def _adaptive_avg_pool2d(a: Arguments, shape: Shape) -> Lowered | None:
    if not _image(a["self"]):
        return None
    size = a["output_size"]
    return Lowered("adaptive_avg_pool2d", [a["self"]], sizes={"size": list(size)})


def _binary(op: str) -> Rule:
    def rule(a: Arguments, shape: Shape) -> Lowered | None:
        x, y = a["self"], a["other"]
        if a.get("alpha", 1) != 1 or not isinstance(x, Read) or not isinstance(y, Read):
            return None
        return Lowered(op, [x, y])

    return rule


def _concat(a: Arguments, shape: Shape) -> Lowered | None:
    inputs = a["tensors"]
    if not all(isinstance(x, Read) for x in inputs):
        return None
    return Lowered("concat", list(inputs), {"dim": a["dim"]})


def _resize(mode: str) -> Rule:
    def rule(a: Arguments, shape: Shape) -> Lowered | None:
        x = a.get("input", a.get("self"))
        if not _image(x):
            return None
        size = shape()[2:]
        scales = a.get("scale_factors") or [a.get("scales_h"), a.get("scales_w")]
        for before, after, scale in zip(x.shape[2:], size, scales, strict=True):
            hint = after.hint if isinstance(after, Size) else after
            # A given scale decides which pixels are read, unless it is that of the sizes anyway:
            # whole numbers are, at every size.
            if scale is not None and (scale != int(scale) or before * int(scale) != hint):
                return None
        corners = bool(a.get("align_corners", False))
        attrs = {"mode": mode, "align_corners": corners}
        return Lowered("resize", [x], attrs, sizes={"size": size})

    return rule


def _simple(op: str) -> Rule:
    def rule(a: Arguments, shape: Shape) -> Lowered | None:
        x = next(iter(a.values()))
        return Lowered(op, [x]) if isinstance(x, Read) else None

    return rule


def _clamp(a: Arguments, shape: Shape) -> Lowered | None:
    low, high = a.get("min_val", a.get("min")), a.get("max_val", a.get("max"))
    if not isinstance(a["self"], Read) or not isinstance(low, int | float):
        return None
    if low == 0 and high is None:
        return Lowered("relu", [a["self"]])
    if not isinstance(high, int | float):
        return None
    if (low, high) == (0, 6):
        return Lowered("relu6", [a["self"]])
    return Lowered("clamp", [a["self"]], {"min": float(low), "max": float(high)})


def _softmax(a: Arguments, shape: Shape) -> Lowered | None:
    if not isinstance(a["self"], Read) or a.get("dtype") is not None or a.get("half_to_float"):
        return None
    return Lowered("softmax", [a["self"]], {"dim": a["dim"]})


def _argmax(a: Arguments, shape: Shape) -> Lowered | None:
    if not isinstance(a["self"], Read) or a["dim"] is None:
        return None
    return Lowered("argmax", [a["self"]], {"dim": a["dim"], "keepdim": a["keepdim"]})


def _identity(a: Arguments, shape: Shape) -> Lowered | None:
    x = next(iter(a.values()))
    return Lowered("identity", [x]) if isinstance(x, Read) and not a.get("train") else None


def _flatten(a: Arguments, shape: Shape) -> Lowered | None:
    attrs = {"start": a["start_dim"], "end": a["end_dim"]}
    return Lowered("flatten", [a["self"]], attrs) if isinstance(a["self"], Read) else None


def _reshape(a: Arguments, shape: Shape) -> Lowered | None:
    sizes = list(a["size"] if "size" in a else a["shape"])
    return (
        Lowered("reshape", [a["self"]], sizes={"shape": sizes})
        if isinstance(a["self"], Read)
        else None
    )


def _mean(a: Arguments, shape: Shape) -> Lowered | None:
    if not isinstance(a["self"], Read) or not a["dim"] or a["dtype"] is not None:
        return None
    return Lowered("mean", [a["self"]], {"dims": tuple(a["dim"]), "keepdim": a["keepdim"]})


RULES: dict[str, Rule] = {
    "aten.conv2d.default": _conv2d,
    "aten.conv2d.padding": _conv2d,
    "aten.convolution.default": _conv2d,
    "aten.linear.default": _linear,
    "aten.addmm.default": _matmul,
    "aten.mm.default": _matmul,
    "aten.matmul.default": _matmul,
    "aten.batch_norm.default": _batch_norm,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.max_pool2d.default": _max_pool2d,
    "aten.max_pool2d_with_indices.default": _max_pool2d,
    "aten.avg_pool2d.default": _avg_pool2d,
    "aten.adaptive_avg_pool2d.default": _adaptive_avg_pool2d,
    "aten.add.Tensor": _binary("add"),
    "aten.mul.Tensor": _binary("mul"),
    "aten.cat.default": _concat,
    "aten.upsample_nearest2d.vec": _resize("nearest"),
    "aten.upsample_nearest2d.default": _resize("nearest"),
    "aten.upsample_bilinear2d.vec": _resize("bilinear"),
    "aten.upsample_bilinear2d.default": _resize("bilinear"),
    "aten.relu.default": _simple("relu"),
    "aten.relu6.default": _simple("relu6"),
    "aten.hardtanh.default": _clamp,
    "aten.clamp.default": _clamp,
    "aten.clamp_min.default": _clamp,
    "aten.sigmoid.default": _simple("sigmoid"),
    "aten.silu.default": _simple("silu"),
    "aten.hardswish.default": _simple("hardswish"),
    "aten.softmax.int": _softmax,
    "aten._softmax.default": _softmax,
    "aten.argmax.default": _argmax,
    "aten.dropout.default": _identity,
    "aten.feature_dropout.default": _identity,
    "aten.alpha_dropout.default": _identity,
    "aten.clone.default": _identity,
    "aten.alias.default": _identity,
    "aten.contiguous.default": _identity,
    "aten.detach.default": _identity,
    "aten.flatten.using_ints": _flatten,
    "aten.view.default": _reshape,
    "aten.reshape.default": _reshape,
    "aten._unsafe_view.default": _reshape,
    "aten.mean.dim": _mean,
}
