"""Dropout that does not wait for its random numbers.

torch draws one Bernoulli sample per element, on one core: 12 ns each, which is a twelfth of a dense
training step of our largest network and a third of a sparse one. Here 64 random bits serve four or
eight elements.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemtl.ops.dispatch import in_functorch, through_torch

BITS = 16  # per element, or 8 where they say p exactly


class Dropout(nn.Dropout):
    """nn.Dropout; on the CPU its mask is drawn from random bytes of torch's generator.

    p: probability of a zero, in [0, 1]; taken to the nearest multiple of 2^-16, and the survivors
       are scaled by exactly that. An element's fate depends on its index alone: the same seed drops
       the same ones whatever the memory format.
    """

    def forward(self, input: Tensor) -> Tensor:
        ours = self.training and input.device.type == "cpu" and not self.inplace
        dropped = round(self.p * 2**BITS)
        if not ours or not 0 < dropped < 2**BITS or through_torch(input) or in_functorch():
            return F.dropout(input, self.p, self.training, self.inplace)
        return _Masked.apply(input, kept(input, dropped), 2**BITS / (2**BITS - dropped))


def kept(like: Tensor, dropped: int) -> Tensor:
    """Which elements survive: bool, of the shape and memory format of `like`.

    dropped: probability of False, in units of 2^-16
    """
    count, few = like.numel(), dropped % 256 == 0
    per_draw = 8 if few else 4
    draws = torch.empty(-(-count // per_draw), dtype=torch.int64).random_(-(2**63), None)
    # Unsigned, so that the smallest `dropped` of all values are the dropped ones.
    parts = draws.view(torch.uint8) if few else draws.view(torch.uint16).to(torch.int32)
    alive = parts[:count] >= (dropped // 256 if few else dropped)
    alive = alive.view(like.shape)
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        return alive.contiguous(memory_format=torch.channels_last)
    return alive


class _Masked(torch.autograd.Function):
    """x · alive · scale, which keeps one byte per element for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alive: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(alive)
        ctx.scale = scale
        return torch.mul(x, alive).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (alive,) = ctx.saved_tensors
        return torch.mul(grad, alive).mul_(ctx.scale), None, None
