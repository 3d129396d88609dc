"""Arguments of sparse_conv2d: their geometry, and what is said of those it cannot take."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsemtl.ops.pattern import Pattern
from sparsemtl.ops.sparse_conv2d_plan import Geometry

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}
Pair = int | Sequence[int]

_MOST_PIXELS = 1 << 31  # of a channel: rows and columns are counted in 32 bits
_FURTHEST = 1 << 28  # a step of the kernel over the input, in 32 bits with what is added to it

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pair(value: Pair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value
    return first, second


def geometry(weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Geometry:
    """The convolution's integers; raises ValueError or TypeError where they make none."""
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"sparse_conv2d: Expected weight to be a Tensor, got {type(weight).__name__}"
        )
    shape = tuple(weight.shape)
    given = (stride, padding, dilation, groups)
    # Known ones are found again: a call of a small convolution must not cost more than its work.
    if not torch.compiler.is_compiling() and all(map(_is_plain, (shape, *given))):
        return _known_geometry(shape, *given)
    return _new_geometry(shape, *given)


def _is_plain(value: Any) -> bool:
    """An integer or a tuple of them, none symbolic: what a cache may hold."""
    if type(value) is tuple:
        return all(type(entry) is int for entry in value)
    return type(value) is int


def _new_geometry(
    shape: tuple[int, ...], stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Geometry:
    pairs = {}
    named = {"stride": (stride, 1), "padding": (padding, 0), "dilation": (dilation, 1)}
    for name, (value, least) in named.items():
        entries = [value] if isinstance(value, int) else value
        good = not isinstance(entries, str) and isinstance(entries, Sequence)
        if not good or len(entries) not in (1, 2) or not all(_is_int(e, least) for e in entries):
            raise ValueError(
                f"sparse_conv2d: Expected {name} to be an integer ≥ {least} or a pair of them, "
                f"got {value!r}"
            )
        pairs[name] = (entries[0], entries[-1])
    if len(shape) != 4:
        raise ValueError(
            "sparse_conv2d: Expected weight to have 4 axes [K, C / groups, kh, kw], "
            f"got shape {list(shape)}"
        )
    _check_reach(pairs, shape[2:])
    return Geometry(
        pairs["stride"], pairs["padding"], pairs["dilation"], (shape[2], shape[3]), groups
    )


def _check_reach(pairs: dict[str, tuple[int, int]], kernel: tuple[int, ...]) -> None:
    for name, entries in pairs.items():
        for entry, taps in zip(entries, kernel, strict=True):
            if entry * (max(taps - 1, 1) if name == "dilation" else 1) >= _FURTHEST:
                raise ValueError(
                    f"sparse_conv2d: Expected {name} to reach over fewer than 2^28 pixels, which "
                    f"32-bit offsets hold, got {entry} with kernel {tuple(kernel)}"
                )


_known_geometry = lru_cache(maxsize=1024)(_new_geometry)


def _is_int(value: Any, least: int) -> bool:
    if isinstance(value, torch.SymInt):
        return True
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Geometry,
    pattern: Pattern | None,
    residual: Tensor | None,
    activation: str | None,
) -> None:
    who = "sparse_conv2d: Expected"
    _check_tensor("x", x, x)
    _check_tensor("weight", weight, x)
    if bias is not None:
        _check_tensor("bias", bias, x)
    if residual is not None:
        _check_tensor("residual", residual, x)
    rows, channels, kh, kw = weight.shape
    if not _is_int(g.groups, 1) or rows % g.groups != 0:
        raise ValueError(f"{who} groups to divide the {rows} output channels, got {g.groups!r}")
    if kh < 1 or kw < 1:
        raise ValueError(f"{who} weight to have a kernel, got shape {list(weight.shape)}")
    if x.dim() != 4 or x.shape[1] != channels * g.groups:
        raise ValueError(
            f"{who} x to be [B, {channels * g.groups}, H, W] for weight {list(weight.shape)} and "
            f"{g.groups} groups, got shape {list(x.shape)}"
        )
    out = g.output_size(x.shape[2], x.shape[3])
    if out[0] < 1 or out[1] < 1:
        raise ValueError(
            f"{who} x to be at least as large as the dilated kernel, got {list(x.shape[2:])} with "
            f"kernel {g.kernel}, dilation {g.dilation} and padding {g.padding}"
        )
    if x.shape[2] * x.shape[3] >= _MOST_PIXELS or out[0] * out[1] >= _MOST_PIXELS:
        raise ValueError(
            f"{who} fewer than 2^31 pixels in a channel of x and of the output, which 32-bit "
            f"offsets reach, got {list(x.shape[2:])} and {list(out)}"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"{who} bias to have shape [{rows}], got {list(bias.shape)}")
    expected = (x.shape[0], rows, *out)
    if residual is not None and tuple(residual.shape) != expected:
        raise ValueError(
            f"{who} residual to have the output's shape {list(expected)}, "
            f"got {list(residual.shape)}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{who} activation to be None, 'relu' or 'relu6', got {activation!r}")
    if pattern is not None:
        _check_pattern(weight, pattern, g.groups)


def _check_tensor(name: str, tensor: Any, x: Tensor) -> None:
    who = "sparse_conv2d: Expected"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{who} {name} to be a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS or tensor.layout is not torch.strided:
        raise TypeError(
            f"{who} {name} to be strided float32, bfloat16, float16 or float64, "
            f"got {tensor.layout} {tensor.dtype}"
        )
    if tensor.dtype is not x.dtype or tensor.device != x.device:
        raise ValueError(
            f"{who} {name} to be {x.dtype} on {x.device} like x, "
            f"got {tensor.dtype} on {tensor.device}"
        )


def _check_pattern(weight: Tensor, pattern: Any, groups: int) -> None:
    who = "sparse_conv2d: Expected"
    if not isinstance(pattern, Pattern):
        raise TypeError(f"{who} pattern to be a Pattern, got {type(pattern).__name__}")
    if pattern.shape != tuple(weight.shape) or pattern.groups != groups:
        raise ValueError(
            f"{who} pattern to be built for weight {list(weight.shape)} and groups={groups}, "
            f"got one for weight {list(pattern.shape)} and groups={pattern.groups}"
        )
    if pattern.device != weight.device and not weight.is_meta:
        raise ValueError(
            f"{who} pattern to be on {weight.device} like weight, got one on {pattern.device}"
        )
