"""How each backend computes sparse_conv2d; the op itself stands in sparse_conv2d.py."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemtl.ops.availability import native_module
from sparsemtl.ops.pattern import PackedList, Pattern
from sparsemtl.ops.sparse_conv2d_plan import (
    LINEAR,
    Geometry,
    Pass,
    Taps,
    plan_pass,
    read_source,
    taps_of_forward,
    taps_of_input_grad,
    workspace,
)

ACTIVATIONS = {None: 0, "relu": 1, "relu6": 2}


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _rounded(per_column: float) -> float:
    # Plans are cached, and the density of a training run wanders: keep few of them.
    return float(f"{per_column:.1g}")


def _plan(
    kind: str,
    taps: Taps,
    stride: tuple[int, int],
    source: Tensor,
    out: tuple[int, int, int],
    groups: int,
    packed: PackedList,
) -> Pass:
    return plan_pass(
        kind,
        taps,
        stride,
        tuple(source.shape),
        out,
        groups,
        _rounded(packed.per_column),
        packed.sizes[3],
        native_module().isa(),
    )


def _scratch(plan: Pass, packed: PackedList, threads: int) -> Tensor:
    floats = native_module().sparse_conv2d_scratch(
        plan.geometry, plan.taps.data_ptr(), packed.sizes, packed.addresses, threads
    )
    return workspace("scratch", floats)


def _run_forward(
    plan: Pass,
    packed: PackedList,
    source: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> None:
    threads = torch.get_num_threads()
    planes, _ = read_source(source, plan.source)
    scratch = _scratch(plan, packed, threads)
    native_module().sparse_conv2d_forward(
        plan.geometry,
        plan.taps.data_ptr(),
        packed.sizes,
        packed.addresses,
        planes.data_ptr(),
        out.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        ACTIVATIONS[activation],
        scratch.data_ptr(),
        threads,
    )


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
    y = torch.empty(x.shape[0], pattern.shape[0], height, width, dtype=torch.float32)
    if y.numel() > 0:
        source, packed = _fp32(x), pattern.forward_list()
        out = (pattern.shape[0], height, width)
        plan = _plan("forward", taps_of_forward(g), g.stride, source, out, g.groups, packed)
        bias = None if bias is None else _fp32(bias)
        residual = None if residual is None else _fp32(residual)
        _run_forward(plan, packed, source, y, bias, residual, activation)
    return y.to(x.dtype)


def native_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pattern: Pattern,
    g: Geometry,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = _native_input_grad(grad, pattern, g, x) if needs[0] else None
    return grad_x, _native_weight_grad(grad, pattern, g, x) if needs[1] else None


def _native_input_grad(grad: Tensor, pattern: Pattern, g: Geometry, x: Tensor) -> Tensor:
    grad_x = torch.empty(x.shape, dtype=torch.float32)
    if grad_x.numel() == 0 or grad.numel() == 0:
        return torch.zeros_like(grad_x).to(x.dtype)
    source, packed = _fp32(grad), pattern.transposed_list()
    for phase in product(range(g.stride[0]), range(g.stride[1])):
        part = grad_x[:, :, phase[0] :: g.stride[0], phase[1] :: g.stride[1]]
        if part.numel() == 0:
            continue
        out = part if part.is_contiguous() else torch.empty(part.shape, dtype=torch.float32)
        taps, shape = taps_of_input_grad(g, phase), (out.shape[1], out.shape[2], out.shape[3])
        plan = _plan("forward", taps, (1, 1), source, shape, g.groups, packed)
        _run_forward(plan, packed, source, out)
        if out is not part:
            part.copy_(out)
    return grad_x.to(x.dtype)


def _native_weight_grad(grad: Tensor, pattern: Pattern, g: Geometry, x: Tensor) -> Tensor:
    """Dense, zero off the pattern."""
    packed = pattern.element_list()
    values = torch.empty(packed.nonzeros + 3, dtype=torch.float32)
    if x.numel() == 0 or grad.numel() == 0:
        return pattern.spread(values.zero_(), packed).to(x.dtype)
    source, out = _fp32(x), (grad.shape[1], grad.shape[2], grad.shape[3])
    taps = taps_of_forward(g)
    plan = _plan("grad", taps, g.stride, source, out, g.groups, packed)
    planes, finite = read_source(source, plan.source)
    if plan.mode == LINEAR and not finite:
        # Gaps between rows take 0 · x into the sum, which is exact for finite x only.
        plan = _plan("table", taps, g.stride, source, out, g.groups, packed)
        planes, _ = read_source(source, plan.source)
    threads = torch.get_num_threads()
    partials = workspace("partials", threads * (packed.nonzeros + 3))
    scratch, grad_y = _scratch(plan, packed, threads), _fp32(grad)
    native_module().sparse_conv2d_weight_grad(
        plan.geometry,
        plan.taps.data_ptr(),
        packed.sizes,
        packed.addresses,
        planes.data_ptr(),
        grad_y.data_ptr(),
        partials.data_ptr(),
        values.data_ptr(),
        scratch.data_ptr(),
        threads,
    )
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
