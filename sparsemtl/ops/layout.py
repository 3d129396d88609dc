"""How a tensor lies in memory: kernels walk memory, so inputs and outputs must agree on it."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in whatever order."""
    if tensor.is_contiguous():
        return True
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return True
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor itself if dense, else a copy laid out as `torch.empty_like` would be."""
    return tensor if is_dense(tensor) else torch.empty_like(tensor).copy_(tensor)


def laid_out_like(tensor: Tensor, model: Tensor) -> Tensor:
    """Return tensor with its elements in memory in the order of a dense model of equal shape."""
    if tensor.dtype == model.dtype:
        return ordered_like(tensor, model)
    return torch.empty_like(model).copy_(tensor)


def ordered_like(tensor: Tensor, model: Tensor) -> Tensor:
    """As `laid_out_like`, but of the tensor's own type."""
    if tensor.stride() == model.stride():
        return tensor
    if tensor.is_contiguous() and model.is_contiguous():  # strides of size-1 axes may differ
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)
