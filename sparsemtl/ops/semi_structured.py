"""1x1 convolutions with 2:4 weights on the sparse tensor cores, through torch's own tensors.

At most two of each four neighbouring input channels are alive; `to_sparse_semi_structured` packs
such a matrix, and torch multiplies it by cuSPARSELt or CUTLASS. Only the forward pass is sparse:
the gradients need the weight along its output channels, where it is not 2:4, and are torch's dense
ones. No kernel is known for 2:4 convolutions with more than one tap.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsemtl.ops.availability import why_not_on_gpu
from sparsemtl.ops.sparse_conv2d_plan import Geometry

ROWS, COLUMNS = 32, 64  # output and input channels must be multiples: CUTLASS's, the stricter
PIXELS = 8  # below it nothing is left of a tile
TYPES = (torch.bfloat16, torch.float16)


def why_not_semi_structured(x: Tensor, weight: Tensor, g: Geometry) -> str | None:
    """Why a layer cannot run through 2:4 tensors; None if it can.

    x: [B, C, H, W]   weight: [K, C, kh, kw], of which the caller knows that it is 2:4
    """
    if g.kernel != (1, 1) or g.stride != (1, 1) or g.padding != (0, 0) or g.groups != 1:
        return "2:4 tensors multiply matrices: it takes 1x1 kernels of stride 1 in one group"
    if weight.dtype not in TYPES or x.dtype is not weight.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}, it takes one of bfloat16 and float16"
    outputs, channels = weight.shape[:2]
    if outputs == 0 or channels == 0 or outputs % ROWS or channels % COLUMNS:
        return (
            f"the weight has {outputs} x {channels} channels, it takes multiples of "
            f"{ROWS} x {COLUMNS}"
        )
    if x.numel() // max(1, channels) < PIXELS:
        return f"x has {x.numel() // channels} pixels, it takes {PIXELS} and more"
    return why_not_on_gpu(weight)


class SemiStructured:
    """A 2:4 weight, packed anew when it changes."""

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._stamp: object = None

    def follow(self, weight: Tensor, stamp: object) -> Tensor:
        """The packed matrix [K, C] of a weight [K, C, 1, 1].

        stamp: equal for equal weights; None where nothing is known, and it is packed anew
        """
        if self._packed is None or stamp is None or stamp != self._stamp:
            self._packed, self._stamp = pack(weight.detach().flatten(1).contiguous()), stamp
        return self._packed


def pack(matrix: Tensor) -> Tensor:
    """torch's packed form of a 2:4 matrix.   matrix: [K, C], contiguous, on a CUDA device"""
    from torch.sparse import to_sparse_semi_structured

    with warnings.catch_warnings():  # of the prototype stage
        warnings.simplefilter("ignore", UserWarning)
        found: Tensor = to_sparse_semi_structured(matrix)
    return found


def semi_structured_conv(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d(x, weight, bias) of a 1x1 kernel.

    x: [B, C, H, W]   packed: [K, C], from `SemiStructured`   returns: [B, K, H, W], channels_last
    """
    batch, channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, channels)  # no copy of what is channels_last
    y = linear(rows, packed, bias)
    y = y.reshape(batch, height, width, -1).permute(0, 3, 1, 2)
    return y.contiguous(memory_format=torch.channels_last)
