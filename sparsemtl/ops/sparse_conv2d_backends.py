"""How each backend computes sparse_conv2d; the op itself stands in sparse_conv2d.py."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemtl.ops.availability import native_module
from sparsemtl.ops.memory import empty_planes
from sparsemtl.ops.packed_list import PackedList
from sparsemtl.ops.pattern import Pattern
from sparsemtl.ops.sparse_conv2d_checks import ACTIVATIONS
from sparsemtl.ops.sparse_conv2d_plan import (
    DIRECT,
    Geometry,
    plan_pass,
    taps_of_forward,
    taps_of_input_grad,
)


def _fp32(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32 and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().resolve_neg().to(torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


_LISTS = {
    "forward": Pattern.forward_list,
    "input": Pattern.transposed_list,
    "grad": Pattern.element_list,
    "table": Pattern.element_list,
}
_MOST_PHASES = 4096  # of a stride, each a plane of its own: kernels beyond are dense ones
_MOST_PLANS = 64  # of a pattern: inputs of ever new sizes must not fill the memory


def _planned(
    kind: str,
    pattern: Pattern,
    g: Geometry,
    source: Tensor,
    out: tuple[int, int, int],
    phase: tuple[int, int] = (0, 0),
) -> tuple[Any, PackedList]:
    """Return the native plan of one pass and its list, which holds the weight's present values.

    kind: a key of _LISTS   source: what the pass reads   out: channels, height, width
    phase: of x, for the input gradient
    """
    batch, channels, height, width = source.shape
    shape, isa = (batch, channels, height, width), native_module().isa()
    key = (kind, g, shape, out, phase, isa)
    found = pattern.plans.get(key)
    if found is not None:
        return found[1], _LISTS[kind](pattern, whole=found[0])
    per_column = pattern.per_column(transposed=kind == "input", vectors=kind == "forward")
    vector = pattern.vector if kind == "forward" else 1
    if kind == "input":
        taps = taps_of_input_grad(g, phase)
        plan = plan_pass("forward", taps, (1, 1), shape, out, g.groups, per_column, vector, isa)
    else:
        taps = taps_of_forward(g)
        plan = plan_pass(kind, taps, g.stride, shape, out, g.groups, per_column, vector, isa)
    packed = _LISTS[kind](pattern, whole=plan.mode == DIRECT)
    native = native_module().ConvPlan(
        plan.geometry, plan.taps, packed.sizes, packed.addresses, plan.copy, torch.get_num_threads()
    )
    if len(pattern.plans) >= _MOST_PLANS:
        pattern.plans.clear()
    pattern.plans[key] = plan.mode == DIRECT, native
    return native, packed


def _needed(g: Geometry, height: int, width: int) -> Geometry:
    """The same for an output of this size: a single row or column is not strided over."""
    stride = (1 if height == 1 else g.stride[0], 1 if width == 1 else g.stride[1])
    return g if stride == g.stride else replace(g, stride=stride)


def _too_coarse(g: Geometry) -> bool:
    return g.stride[0] * g.stride[1] > _MOST_PHASES


def native(
    x: Tensor,
    weight: Tensor,
    pattern: Pattern,
    g: Geometry,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The pattern holds the weight's values already."""
    height, width = g.output_size(x.shape[2], x.shape[3])
    out = (pattern.shape[0], height, width)
    needed = _needed(g, height, width)
    if _too_coarse(needed):
        return reference(x, weight, pattern, g, bias, residual, activation)
    y = empty_planes(x.shape[0], *out)
    if y.numel() > 0:
        source = _fp32(x)
        plan, _ = _planned("forward", pattern, needed, source, out)
        bias = None if bias is None else _fp32(bias)
        residual = None if residual is None else _fp32(residual)
        plan.forward(
            source.data_ptr(), y.data_ptr(), _address(bias), _address(residual),
            ACTIVATIONS[activation], torch.get_num_threads(),
        )  # fmt: skip
    return y if x.dtype is torch.float32 else y.to(x.dtype)


def native_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pattern: Pattern,
    g: Geometry,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    needed = _needed(g, grad.shape[2], grad.shape[3])
    if _too_coarse(needed):
        return reference_backward(grad, x, weight, pattern, g, needs)
    grad_x = _native_input_grad(grad, pattern, needed, x) if needs[0] else None
    return grad_x, _native_weight_grad(grad, pattern, needed, x) if needs[1] else None


def _native_input_grad(grad: Tensor, pattern: Pattern, g: Geometry, x: Tensor) -> Tensor:
    grad_x = empty_planes(*x.shape)
    if grad_x.numel() == 0 or grad.numel() == 0:
        return torch.zeros_like(grad_x).to(x.dtype)
    source, threads = _fp32(grad), torch.get_num_threads()
    for phase in product(range(g.stride[0]), range(g.stride[1])):
        part = grad_x[:, :, phase[0] :: g.stride[0], phase[1] :: g.stride[1]]
        if part.numel() == 0:
            continue
        out = part
        if not part.is_contiguous():
            out = torch.empty_like(part, memory_format=torch.contiguous_format)
        shape = (out.shape[1], out.shape[2], out.shape[3])
        plan, _ = _planned("input", pattern, g, source, shape, phase)
        plan.forward(source.data_ptr(), out.data_ptr(), 0, 0, 0, threads)
        if out is not part:
            part.copy_(out)
    return grad_x.to(x.dtype)


def _native_weight_grad(grad: Tensor, pattern: Pattern, g: Geometry, x: Tensor) -> Tensor:
    """Dense, zero off the pattern."""
    if x.numel() == 0 or grad.numel() == 0:
        return torch.zeros(pattern.shape, dtype=x.dtype, device="cpu")
    source, out = _fp32(x), (grad.shape[1], grad.shape[2], grad.shape[3])
    grad_y, threads = _fp32(grad), torch.get_num_threads()
    for kind in ("grad", "table"):
        plan, packed = _planned(kind, pattern, g, source, out)
        values = torch.empty(packed.nonzeros + 3, dtype=torch.float32, device="cpu")
        if plan.weight_grad(source.data_ptr(), grad_y.data_ptr(), values.data_ptr(), threads):
            break  # else x is not finite, and gaps between rows would take 0 · x into the sums
    return pattern.spread(values, packed).to(x.dtype)


# Reference: plain torch on the dense masked weight.


def _masked(weight: Tensor, pattern: Pattern) -> Tensor:
    return torch.where(pattern.mask(), weight, 0.0)


def reference(
    x: Tensor,
    weight: Tensor,
    pattern: Pattern,
    g: Geometry,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    masked = _masked(weight, pattern)
    y = F.conv2d(x, masked, bias, g.stride, g.padding, g.dilation, g.groups)
    if residual is not None:
        y = y + residual
    if activation is not None:
        y = F.relu(y) if activation == "relu" else F.relu6(y)
    return y.contiguous()


def reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pattern: Pattern,
    g: Geometry,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, _masked(weight, pattern), None, g.stride, g.padding, g.dilation,
        False, (0, 0), g.groups, (*needs, False),
    )  # fmt: skip
    return grad_x, None if grad_weight is None else _masked(grad_weight, pattern)
