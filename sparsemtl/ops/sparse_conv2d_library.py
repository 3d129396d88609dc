"""sparse_conv2d as torch.library has it: what torch.compile, torch.export and modes see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsemtl.ops.sparse_conv2d import SPARSE_CONV2D, activation_grad, compute, pattern_of
from sparsemtl.ops.sparse_conv2d_checks import geometry


@torch.library.custom_op("sparsemtl::sparse_conv2d", mutates_args=())
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    keep: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    structure: str,
    activation: str | None,
) -> Tensor:
    g = geometry(weight, stride, padding, dilation, groups)
    pattern = pattern_of(weight, keep, groups, structure)
    # As the fake kernel says; on a GPU the result is channels_last.
    return compute(x, weight, bias, residual, pattern, g, activation).contiguous()


@torch.library.custom_op("sparsemtl::sparse_conv2d_backward", mutates_args=())
def _conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    structure: str,
) -> tuple[Tensor, Tensor]:
    g = geometry(weight, stride, padding, dilation, groups)
    pattern = pattern_of(weight, keep, groups, structure)
    pattern.update(weight)
    backend = SPARSE_CONV2D.choose(x, weight)
    assert backend.backward is not None
    grad_x, grad_weight = backend.backward(grad, x, weight, pattern, g, (True, True))
    return grad_x.contiguous(), grad_weight.contiguous()


@_conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    keep: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    structure: str,
    activation: str | None,
) -> Tensor:
    g = geometry(weight, stride, padding, dilation, groups)
    return x.new_empty(x.shape[0], weight.shape[0], *g.output_size(x.shape[2], x.shape[3]))


@_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, keep, *ctx.rest, ctx.activation = inputs
    ctx.save_for_backward(x, weight, keep, output if ctx.activation is not None else None)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, keep, y = ctx.saved_tensors
    if y is not None:
        grad = activation_grad(grad, y, ctx.activation)
    grad_x, grad_weight = torch.ops.sparsemtl.sparse_conv2d_backward(
        grad, x, weight, keep, *ctx.rest
    )
    needs = ctx.needs_input_grad
    grad_bias = grad.sum((0, 2, 3)) if needs[2] else None
    return grad_x, grad_weight, grad_bias, grad if needs[3] else None, *[None] * 7


_conv.register_autograd(_differentiate, setup_context=_save)


def register_flops() -> None:
    """Teach torch's FlopCounterMode this op; before the mode is made, for it copies its table.

    Not done on import, because torch.utils.flop_counter brings in triton.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    op = torch.ops.sparsemtl.sparse_conv2d
    if op not in flop_registry:
        register_flop_formula(op, get_raw=True)(_flops)


def _flops(x: Tensor, weight: Tensor, *rest: Any, out_val: Tensor, **kwargs: Any) -> int:
    live = weight.numel()  # of a fake weight every value may be alive
    if not weight.is_meta and not isinstance(weight, torch._subclasses.FakeTensor):
        live = int((weight != 0).sum())
    return 2 * live * out_val.shape[0] * out_val.shape[2] * out_val.shape[3]
