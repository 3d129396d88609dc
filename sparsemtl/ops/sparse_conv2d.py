"""Convolution with a sparse weight, in which dead weights cost nothing, forward and backward.

The gradient of the weight is computed on the pattern only and is zero elsewhere; the gradient of
x uses live weights only. For finite inputs all three equal the dense convolution with the masked
weight up to rounding. A NaN or an infinity of x reaches every output that a live weight connects
it to, and no other: a dead weight does not turn it into NaN as dense 0 · inf would. Where a weight
that is NaN or infinite meets padding, the output may be NaN, as dense arithmetic has it, or as if
the tap were absent. All this is of the kernels; the reference is dense arithmetic itself.

On a CPU x, the gradient and the residual are read as contiguous float32: what is laid out otherwise
(channels_last, a slice) or stored narrower (bfloat16, float16) is copied so for the call, and the
weight's values when they change. Arithmetic is float32 throughout; narrow results are rounded once.
torch.func transforms, batched gradients and second derivatives are computed densely.

B: batch. C, K: input, output channels. H, W and OH, OW: input and output size.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsemtl.ops import sparse_conv2d_backends as backends
from sparsemtl.ops import sparse_conv2d_cuda as in_cuda
from sparsemtl.ops import sparse_conv2d_triton as on_gpu
from sparsemtl.ops.availability import why_not_native
from sparsemtl.ops.dispatch import (
    Backend,
    Op,
    in_functorch,
    is_batched,
    requested_backend,
    require_reference,
    through_torch,
)
from sparsemtl.ops.pattern import Pattern, pack_pattern
from sparsemtl.ops.sparse_conv2d_checks import Pair, check, geometry, pair
from sparsemtl.ops.sparse_conv2d_plan import Geometry


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    pattern: Pattern | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """act(conv2d(x, weight · live) + bias + residual), differentiable in all four tensors.

    x:          [B, C, H, W], float32, bfloat16, float16 or float64; any strides
    weight:     [K, C / groups, kh, kw], of x's type; zeros are dead unless `pattern` says otherwise
    bias:       [K], or None
    stride, padding, dilation: an integer or a pair
    pattern:    from `pack_pattern`; it follows `weight`. Default: one kept for this weight tensor
    residual:   [B, K, OH, OW], added before the activation, or None
    activation: None, "relu" or "relu6"
    returns:    [B, K, OH, OW], contiguous, or channels_last where Triton computes it; of x's type;
                arithmetic in float32 (float64 for float64)
    raises:     TypeError, ValueError for other arguments; BackendUnavailable
    """
    g = geometry(weight, stride, padding, dilation, groups)
    bare = bias is None and residual is None and type(pattern) is Pattern
    call = _call(x, weight, g, activation) if bare else None
    backend = None if call is None else pattern.calls.get(call)  # type: ignore[union-attr]
    if backend is None:
        check(x, weight, bias, g, pattern, residual, activation)
    if weight.shape[1] == 0:
        x, weight, pattern = *_with_a_channel(x, weight, groups), None
    tensors = [t for t in (x, weight, bias, residual) if t is not None]
    if in_functorch():
        require_reference(SPARSE_CONV2D)
        return sparse_conv2d_reference(
            x, weight, bias, g.stride, g.padding, g.dilation, groups,
            pattern=pattern, residual=residual, activation=activation,
        )  # fmt: skip
    if x.is_meta or through_torch(*tensors):
        structure = "element" if pattern is None else pattern.structure
        keep = None if pattern is None else pattern.keep
        return torch.ops.sparsemtl.sparse_conv2d(
            x, weight, bias, residual, keep, g.stride, g.padding, g.dilation, groups, structure,
            activation,
        )  # fmt: skip
    if pattern is None:
        pattern = pattern_of(weight, None, groups, "element")
    if backend is None:
        backend = SPARSE_CONV2D.choose(x, weight)
        if call is not None and pattern.follows(weight):
            pattern.remember_call(call, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _SparseConv2d.apply(x, weight, bias, residual, pattern, g, activation, backend)
    return compute(x, weight, bias, residual, pattern, g, activation, backend)


def sparse_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    pattern: Pattern | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The meaning of sparse_conv2d: a dense convolution, differentiated by torch itself."""
    if pattern is not None:
        weight = torch.where(pattern.mask(), weight, 0.0)
    else:
        weight = torch.where(weight == 0, 0.0, weight)  # dead weights get no gradient
    if weight.shape[1] == 0:
        x, weight = _with_a_channel(x, weight, groups)
    y = F.conv2d(x, weight, bias, pair(stride), pair(padding), pair(dilation), groups)
    return _activate(y if residual is None else y + residual, activation)


def sparse_conv2d_values(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, pattern: Pattern
) -> Tensor:
    """The forward pass alone, without autograd and argument checks: for callers that did both."""
    return compute(x, weight, bias, None, pattern, g, None)


def sparse_conv2d_grads(
    grad: Tensor, x: Tensor, weight: Tensor, g: Geometry, pattern: Pattern, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of weight on the pattern, each only if needed; nothing is checked."""
    backend = SPARSE_CONV2D.choose(x, weight)
    assert backend.backward is not None
    pattern.update(weight)
    backward = backends.reference_backward if is_batched(grad) else backend.backward
    grads: tuple[Tensor | None, Tensor | None] = backward(grad, x, weight, pattern, g, needs)
    return grads


def sparse_conv2d_flops(pattern: Pattern, batch: int, out: tuple[int, int]) -> int:
    """Two per multiply-add of a live weight, those on padding included, of one forward pass."""
    return 2 * pattern.nonzeros * batch * out[0] * out[1]


class _SparseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        pattern: Pattern,
        g: Geometry,
        activation: str | None,
        backend: Backend,
    ) -> Tensor:
        ctx.backend = backend  # a backward may run in another thread
        y = compute(x, weight, bias, residual, pattern, g, activation, backend)
        ctx.pattern, ctx.geometry, ctx.activation = pattern, g, activation
        ctx.save_for_backward(x, weight, y if activation is not None else None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        if y is not None:
            grad = activation_grad(grad, y, ctx.activation)
        ctx.pattern.update(weight)
        needs = ctx.needs_input_grad
        # Plain torch where the gradient stands for many or will be differentiated itself.
        plain = torch.is_grad_enabled() or is_batched(grad)
        backward = backends.reference_backward if plain else ctx.backend.backward
        grad_x, grad_weight = backward(grad, x, weight, ctx.pattern, ctx.geometry, needs[:2])
        grad_bias = grad.sum((0, 2, 3)) if needs[2] else None
        return grad_x, grad_weight, grad_bias, grad if needs[3] else None, *[None] * 4


def _call(x: Tensor, weight: Tensor, g: Geometry, activation: str | None) -> Hashable:
    """All that the checks and the choice of a backend depend on, but for bias and residual: small
    convolutions must not cost more to check than to compute. None for what is not worth knowing."""
    if not (type(x) is Tensor and x.is_cpu and weight.is_cpu) or torch.compiler.is_compiling():
        return None
    kinds = (x.dtype, weight.dtype, x.layout)
    return x.shape, weight.shape, kinds, g, activation, requested_backend()


def compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    pattern: Pattern,
    g: Geometry,
    activation: str | None,
    backend: Backend | None = None,
) -> Tensor:
    backend = backend or SPARSE_CONV2D.choose(x, weight)
    pattern.update(weight)
    return backend.forward(x, weight, pattern, g, bias, residual, activation)


def _with_a_channel(x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The same convolution of no input channels by one of zeros: torch takes the former for one
    without output channels."""
    return F.pad(x, (0, 0, 0, 0, 0, groups)), F.pad(weight, (0, 0, 0, 0, 0, 1))


def _activate(y: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return y
    return F.relu(y) if activation == "relu" else F.relu6(y)


def activation_grad(grad: Tensor, y: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, y, 0)
    return torch.ops.aten.hardtanh_backward(grad, y, 0, 6)  # y is 0 or 6 where x is outside


# Patterns of weights that came without one, and of masks. An entry dies with its tensor.
_patterns: WeakIdKeyDictionary = WeakIdKeyDictionary()


def pattern_of(weight: Tensor, keep: Tensor | None, groups: int, structure: str) -> Pattern:
    owner = weight if keep is None else keep
    pattern: Pattern | None = _patterns.get(owner)
    if (
        pattern is None
        or pattern.shape != tuple(weight.shape)
        or (pattern.groups, pattern.structure) != (groups, structure)
    ):
        pattern = pack_pattern(weight, groups=groups, structure=structure, keep=keep)
        _patterns[owner] = pattern
    return pattern


def _why_not_native(x: Tensor | None = None, weight: Tensor | None = None) -> str | None:
    return why_not_native(weight) if weight is not None else why_not_native()


def _never(*_: Any) -> None:
    return None


SPARSE_CONV2D = Op(
    "sparse_conv2d",
    (
        Backend("triton", on_gpu.triton, on_gpu.triton_backward, on_gpu.why_not_here),
        Backend("cuda", in_cuda.cuda, in_cuda.cuda_backward, in_cuda.why_not_here),
        Backend("native", backends.native, backends.native_backward, _why_not_native),
        Backend("reference", backends.reference, backends.reference_backward, _never),
    ),
)
