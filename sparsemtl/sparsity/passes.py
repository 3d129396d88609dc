"""The three passes of a convolution, dense or sparse, and the Function that runs each as chosen.

With a fixed mask the weight is a master weight, which counts inside the mask alone, and so does its
gradient. Sparse passes read it in place; dense ones read a copy that is zero outside the mask, and
mask the weight's gradient in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from sparsemtl.ops.layout import laid_out_like
from sparsemtl.ops.masking import mask_
from sparsemtl.ops.pattern import Pattern
from sparsemtl.ops.sparse_conv2d import sparse_conv2d_grads, sparse_conv2d_values
from sparsemtl.ops.sparse_conv2d_plan import Geometry

Grads = tuple[Tensor | None, Tensor | None]  # of x and of the weight, each only if needed


@dataclass(frozen=True)
class PassChoice:
    """Which passes of a convolution run sparse; on a GPU, by which candidate of choice_gpu.py."""

    forward: bool | str = False
    input_grad: bool | str = False
    weight_grad: bool | str = False

    @property
    def any(self) -> bool:
        return bool(self.forward or self.input_grad or self.weight_grad)

    def reads_dense(self, x_needs_grad: bool) -> bool:
        """Whether a dense pass will read the weight, which must be masked for it."""
        return not self.forward or (x_needs_grad and not self.input_grad)


DENSE = PassChoice()


def dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """torch's own convolution."""
    return conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def dense_grads(
    grad: Tensor, x: Tensor, weight: Tensor, g: Geometry, needs: tuple[bool, bool]
) -> Grads:
    """torch's own gradients of x and weight, each only if needed."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups,
        (*needs, False),
    )  # fmt: skip
    return grad_x, grad_weight


def chosen_forward(
    choice: PassChoice,
    x: Tensor,
    weight: Tensor,
    dense: Tensor,
    bias: Tensor | None,
    g: Geometry,
    pattern: Pattern,
) -> Tensor:
    """The forward pass.   weight: as sparse passes read it   dense: as dense ones do"""
    if choice.forward:
        return sparse_conv2d_values(x, weight, bias, g, pattern)
    return dense_forward(x, dense, bias, g)


def chosen_grads(
    choice: PassChoice,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dense: Tensor,
    g: Geometry,
    pattern: Pattern,
    keep: Tensor | None,
    needs: tuple[bool, bool],
) -> Grads:
    """The gradients of x and weight, each only if needed; the weight's is zero outside `keep`."""
    sparse = (choice.input_grad, choice.weight_grad)
    grads: list[Tensor | None] = [None, None]
    for kind in (True, False):  # passes of one kind share a call, and what it prepares
        own = (needs[0] and bool(sparse[0]) is kind, needs[1] and bool(sparse[1]) is kind)
        if not any(own):
            continue
        if kind:
            found = sparse_conv2d_grads(grad, x, weight, g, pattern, own)
        else:
            found = _masked_grads(dense_grads(grad, x, dense, g, own), weight, keep)
        grads = [f if n else g for f, n, g in zip(found, own, grads, strict=True)]
    return grads[0], grads[1]


def _masked_grads(grads: Grads, weight: Tensor, keep: Tensor | None) -> Grads:
    """The weight's gradient, zero outside the mask, in the layout that autograd wants it in."""
    grad_x, grad_weight = grads
    if keep is None or grad_weight is None:
        return grads
    return grad_x, mask_(laid_out_like(grad_weight, weight), keep)


class ChosenConv2d(torch.autograd.Function):
    """A convolution whose passes each run dense or sparse.

    keep:  None: the weight's gradient is that of the dense convolution on live weights; on dead
           ones it may be 0 already, which the soft threshold's own backward makes of it anyway.
           A mask: the weight is a master weight, see above.
    dense: with a mask, the masked weight, if `choice.reads_dense`
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: Geometry,
        pattern: Pattern,
        choice: PassChoice,
        keep: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, dense)
        ctx.g, ctx.pattern, ctx.choice, ctx.keep = g, pattern, choice, keep
        return chosen_forward(
            choice, x, weight, weight if dense is None else dense, bias, g, pattern
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, dense = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grads = chosen_grads(
            ctx.choice,
            grad,
            x,
            weight,
            weight if dense is None else dense,
            ctx.g,
            ctx.pattern,
            ctx.keep,
            (needs_x, needs_weight),
        )
        grad_bias = grad.sum((0, 2, 3)) if needs_bias else None
        return (*grads, grad_bias, *[None] * 5)
