"""Linear map with a sparse weight: sparse_conv2d with a 1x1 kernel, rows as pixels.

M: rows, all leading axes of x together. C, K: input, output features.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparsemtl.ops.pattern import Pattern, pack_pattern
from sparsemtl.ops.sparse_conv2d import sparse_conv2d


def pack_linear(
    weight: Tensor, *, structure: str = "element", keep: Tensor | None = None
) -> Pattern:
    """Build the pattern of a weight [K, C] for `sparse_linear`; see `pack_pattern`."""
    _check_weight("pack_linear", weight)
    as_kernel = None if keep is None else keep[:, :, None, None]
    return pack_pattern(weight[:, :, None, None], structure=structure, keep=as_kernel)


def sparse_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, pattern: Pattern | None = None
) -> Tensor:
    """x · (weight · live)ᵀ + bias, differentiable in all three.

    x:       [..., C], float32, bfloat16, float16 or float64
    weight:  [K, C], of x's type; zeros are dead unless `pattern` says otherwise
    bias:    [K], or None
    pattern: from `pack_linear`; it follows `weight`. Default: packed for this call
    returns: [..., K]
    raises:  TypeError, ValueError for other arguments; BackendUnavailable

    Kernels work on whole vectors of rows: below 16 rows most lanes are idle.
    """
    _check_weight("sparse_linear", weight)
    if not isinstance(x, Tensor):
        raise TypeError(f"sparse_linear: Expected x to be a Tensor, got {type(x).__name__}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"sparse_linear: Expected x to have {weight.shape[1]} features on its last axis, "
            f"got shape {list(x.shape)}"
        )
    if x.numel() == 0:
        return F.linear(x, weight, bias)  # nothing to compute, but shapes and gradients to return
    rows = x.reshape(-1, x.shape[-1])  # [M, C]
    pixels = rows.t()[None, :, None, :]  # [1, C, 1, M]
    y = sparse_conv2d(pixels, weight[:, :, None, None], bias, pattern=pattern)
    return y[0, :, 0, :].t().reshape(*x.shape[:-1], weight.shape[0])


def sparse_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, pattern: Pattern | None = None
) -> Tensor:
    """The meaning of sparse_linear: a dense product, differentiated by torch itself."""
    live = weight != 0 if pattern is None else pattern.mask().reshape(weight.shape)
    return F.linear(x, weight.where(live, weight.new_zeros(())), bias)


def _check_weight(who: str, weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{who}: Expected weight to be a Tensor, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"{who}: Expected weight to be [K, C], got shape {list(weight.shape)}")
