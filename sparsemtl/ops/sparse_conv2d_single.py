"""A convolution over single live weights that never change again, as inference has them.

On a CUDA device the lists are packed once and nothing but the kernel is launched, so that a CUDA
graph can hold it; elsewhere the op `sparse_conv2d` does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemtl.ops import sparse_conv2d_cuda as in_cuda
from sparsemtl.ops.availability import DTYPES, native_module
from sparsemtl.ops.pattern import pack_pattern
from sparsemtl.ops.sparse_conv2d import sparse_conv2d
from sparsemtl.ops.sparse_conv2d_backends import ACTIVATIONS
from sparsemtl.ops.sparse_conv2d_plan import Geometry


def why_not_single(x: Tensor, weight: Tensor) -> str | None:
    """Why there is no such convolution for these tensors; None if there is."""
    if not weight.is_cuda:
        return None
    return in_cuda.why_not_here(x, weight)


class SingleConv2d:
    """act(conv2d(x, weight) + bias), the zeros of the weight left out.

    weight: [K, C / groups, kh, kw]; its values are taken now
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, g: Geometry, activation: str | None):
        self.g, self.activation = g, activation
        self.bias = None if bias is None else bias.detach().contiguous()
        self._outputs, self._lists = weight.shape[0], None
        values = weight.detach().contiguous()
        if weight.is_cuda:
            live = values != 0
            capacity = max(int(live.sum()), 1)
            self._lists = in_cuda.pack_lists(
                values.float(), in_cuda.mask_bits(live), False, capacity
            )
        else:
            self._weight, self._pattern = values, pack_pattern(values, groups=g.groups)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, K, OH, OW] contiguous.   x: [B, C, H, W]"""
        g = self.g
        if self._lists is None:
            return sparse_conv2d(
                x, self._weight, self.bias, g.stride, g.padding, g.dilation, g.groups,
                pattern=self._pattern, activation=self.activation,
            )  # fmt: skip
        source = x.contiguous()
        shape = (x.shape[0], self._outputs, *g.output_size(x.shape[2], x.shape[3]))
        y = torch.empty(shape, dtype=x.dtype, device=x.device)
        sizes = [source.shape[0], *source.shape[1:], *y.shape[1:]]
        sizes += [*g.kernel, *g.stride, *g.padding, *g.dilation, 0]
        with torch.cuda.device(x.device):
            native_module().sparse_conv2d_cuda(
                DTYPES[x.dtype],
                sizes,
                self._lists.addresses,
                len(self._lists.sources),
                source.data_ptr(),
                0 if self.bias is None else self.bias.data_ptr(),
                y.data_ptr(),
                ACTIVATIONS[self.activation],
                torch.cuda.current_stream(x.device).cuda_stream,
            )
        return y
