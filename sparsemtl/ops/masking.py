"""Keep what a mask keeps, zero elsewhere; `torch.where` at the speed of memory.

torch's own takes ten times as long as a copy, and more where weight and mask differ in layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsemtl.ops.availability import native_module, why_not_native
from sparsemtl.ops.dispatch import in_functorch, through_torch
from sparsemtl.ops.layout import is_dense, laid_out_like
from sparsemtl.ops.memory import empty_like


def mask_weight(weight: Tensor, keep: Tensor) -> Tensor:
    """where(keep, weight, 0), differentiable in weight any number of times.

    weight: any shape   keep: bool, of its shape   returns: laid out like weight
    """
    if through_torch(weight) or in_functorch() or not _native(weight, keep):
        return torch.where(keep, weight, weight.new_zeros(()))
    y: Tensor = _MaskWeight.apply(weight, keep)
    return y


def masked(tensor: Tensor, keep: Tensor) -> Tensor:
    """Return where(keep, tensor, 0), without autograd; NaN where the mask is False becomes 0 too.

    tensor: any shape   keep: bool, of its shape   returns: laid out like tensor
    """
    tensor = tensor.detach()
    if not _native(tensor, keep):
        found = torch.where(keep, tensor, tensor.new_zeros(()))
        return laid_out_like(found, tensor) if is_dense(tensor) else found
    out = empty_like(tensor)
    _run(tensor, keep, out)
    return out


def mask_into(tensor: Tensor, keep: Tensor, out: Tensor) -> Tensor:
    """`masked`, written over `out`, which is laid out like tensor; without counting the write."""
    tensor = tensor.detach()
    if not _native(tensor, keep) or out.stride() != tensor.stride():
        out.data.copy_(torch.where(keep, tensor, tensor.new_zeros(())))
        return out
    _run(tensor, keep, out)
    return out


def mask_(tensor: Tensor, keep: Tensor) -> Tensor:
    """`masked`, in place; for a tensor that nobody else holds."""
    if not _native(tensor, keep):
        return tensor.copy_(torch.where(keep, tensor, tensor.new_zeros(())))
    _run(tensor, keep, tensor)
    return tensor


class _MaskWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: Tensor) -> Tensor:
        ctx.save_for_backward(keep)
        return masked(weight, keep)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return mask_weight(grad, ctx.saved_tensors[0]), None


def _native(tensor: Tensor, keep: Tensor) -> bool:
    return (
        tensor.dtype is torch.float32
        and keep.dtype is torch.bool
        and why_not_native(tensor) is None
        and tensor.stride() == keep.stride()
        and is_dense(tensor)
    )


def _run(tensor: Tensor, keep: Tensor, out: Tensor) -> None:
    addresses = (tensor.data_ptr(), keep.data_ptr(), out.data_ptr())
    native_module().apply_mask(*addresses, tensor.numel(), torch.get_num_threads())
