"""How each backend computes threshold_adam; the op itself stands in threshold_adam.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemtl.ops.availability import (
    DTYPES,
    native_module,
    why_not_cuda,
    why_not_native,
    why_not_triton,
)
from sparsemtl.ops.layout import is_dense, laid_out_like
from sparsemtl.ops.soft_threshold_backends import (
    TRITON_BLOCK,
    why_not_groups,
    why_not_triton_values,
    why_not_values,
)
from sparsemtl.ops.tiles import Tile

if TYPE_CHECKING:
    from sparsemtl.ops.soft_threshold import ThresholdStats
    from sparsemtl.ops.threshold_adam import AdamRule

Tensors = Sequence[Tensor]
LARGEST_GROUP = 1 << 12  # weights, gradients and two moments of it are in registers at once


def numbers(rule: AdamRule) -> list[float]:
    """A rule as the kernels take it, in the order of AdamRule in csrc/cpu/threshold_adam.h.

    The mean moves from its nearer end, as torch.lerp does, so that β₁ = 0 gives exactly g.
    """
    first, second = rule.betas
    mean_correction, root_correction = rule.corrections
    from_grad = first <= 0.5
    return [
        1.0 - rule.lr * rule.weight_decay if rule.decoupled else 1.0,
        0.0 if rule.decoupled else rule.weight_decay,
        float(from_grad),
        -first if from_grad else 1.0 - first,
        second,
        1.0 - second,
        rule.lr * root_correction / mean_correction,
        rule.eps * root_correction,
    ]


def number_rules(rules: Sequence[AdamRule]) -> tuple[list[float], list[int]]:
    """The numbers of the different rules, one after the other, and which one each tensor has."""
    place: dict[AdamRule, int] = {}
    which = [place.setdefault(rule, len(place)) for rule in rules]
    return [number for rule in place for number in numbers(rule)], which


def why_not_laid_out(weights: Tensors, *others: Tensors) -> str | None:
    """What is written by address must lie in memory as the weight does, without gaps."""
    for weight in weights:
        if not is_dense(weight):
            return f"a weight of shape {list(weight.shape)} has gaps or overlaps in memory"
    for tensors in others:
        for tensor, weight in zip(tensors, weights, strict=False):  # none, where none are known
            if tensor.stride() != weight.stride():
                return (
                    f"moments or values of a weight of shape {list(weight.shape)} have strides "
                    f"{tensor.stride()}, it takes the weight's, {weight.stride()}"
                )
    return None


def _why_not(
    why_not_device: Callable[[Tensor | None], str | None],
    weights: Tensors = (),
    grads: Tensors = (),
    means: Tensors = (),
    squares: Tensors = (),
    rules: Sequence[AdamRule] = (),
    alpha: Tensor | None = None,
    owners: Sequence[int] = (),
    out: ThresholdStats | None = None,
    tile: Tile | None = None,
    *,
    groups: bool = False,
) -> str | None:
    """Why a kernel cannot run here, or cannot take these arguments; None if it can."""
    reason = why_not_device(weights[0] if weights else None)
    if reason is not None or not weights:
        return reason
    if weights[0].dtype is not torch.float32:
        return f"weights are {weights[0].dtype}, it takes float32"
    for tensor in (*weights, *grads, *means, *squares):
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return f"a tensor is a {type(tensor).__name__}, it takes plain ones"
    changed = [t.data_ptr() for t in (*weights, *means, *squares) if t.numel() > 0]
    if len(set(changed)) < len(changed):
        return "two of the tensors to change share their memory"
    values = () if out is None else out.values
    for value in values:
        if (wrong := why_not_values(value.dtype)) is not None:
            return wrong
    if tile is not None:
        limits = (
            "it steps single weights only"
            if not groups
            else why_not_groups(weights, tile, LARGEST_GROUP)
        )
        if limits is not None:
            return limits
    return why_not_laid_out(weights, means, squares, values)


# Native: csrc/cpu/threshold_adam.cpp.

why_not_native_here = partial(_why_not, why_not_native)


def native(
    weights: Tensors,
    grads: Tensors,
    means: Tensors,
    squares: Tensors,
    rules: Sequence[AdamRule],
    alpha: Tensor | None,
    owners: Sequence[int],
    out: ThresholdStats,
    tile: Tile | None = None,
) -> None:
    grads = [laid_out_like(grad, weight) for grad, weight in zip(grads, weights, strict=True)]
    values, masks, alphas = out.values, out.bitmasks or (), [0.0] * len(weights)
    if alpha is not None:
        thresholds = alpha.float().tolist()
        alphas = [thresholds[owner] for owner in owners]
    native_module().threshold_adam(
        _addresses(weights),
        [weight.numel() for weight in weights],
        _addresses(grads),
        _addresses(means),
        _addresses(squares),
        *number_rules(rules),
        DTYPES[values[0].dtype] if values else 0,
        alphas,
        _addresses(values) if values else [0] * len(weights),
        _addresses(masks),
        out.nonzeros.data_ptr() if values else 0,
        torch.get_num_threads(),
    )
    torch.autograd.graph.increment_version([*weights, *means, *squares, *values, *masks])


# Triton: kernels/threshold_adam.py. Imported at first use: triton takes long to load.


def why_not_triton_here(*args: Any) -> str | None:
    """As `_why_not`, for the Triton kernels; their interpreter cannot store bfloat16."""
    reason = _why_not(why_not_triton, *args, groups=True)
    out: ThresholdStats | None = args[7] if len(args) > 7 else None
    if reason is not None or out is None:
        return reason
    return next((r for v in out.values if (r := why_not_triton_values(v.dtype))), None)


def triton(
    weights: Tensors,
    grads: Tensors,
    means: Tensors,
    squares: Tensors,
    rules: Sequence[AdamRule],
    alpha: Tensor | None,
    owners: Sequence[int],
    out: ThresholdStats,
    tile: Tile | None = None,
) -> None:
    from sparsemtl.kernels.threshold_adam import threshold_adam, threshold_adam_groups

    grads = [laid_out_like(grad, weight) for grad, weight in zip(grads, weights, strict=True)]
    masks, state = out.bitmasks or (), (weights, grads, means, squares)
    given = (state, *number_rules(rules), alpha, owners, out.values)
    if tile is None:
        threshold_adam(*given, masks, out.nonzeros, TRITON_BLOCK)
    else:
        assert alpha is not None
        assert out.norms is not None
        threshold_adam_groups(*given, out.norms, out.nonzeros, tile)
    torch.autograd.graph.increment_version([*weights, *means, *squares, *out.values, *masks])


# CUDA C++: csrc/cuda/threshold_adam.cu.


def why_not_cuda_here(*args: Any) -> str | None:
    """As `_why_not`, for the CUDA kernel, which takes few different rules."""
    reason = _why_not(why_not_cuda, *args)
    if reason is None and len(args) > 4:
        most = native_module().THRESHOLD_ADAM_CUDA_RULES
        if len(set(args[4])) > most:
            return f"{len(set(args[4]))} different rules, it takes {most}"
    return reason


def cuda(
    weights: Tensors,
    grads: Tensors,
    means: Tensors,
    squares: Tensors,
    rules: Sequence[AdamRule],
    alpha: Tensor | None,
    owners: Sequence[int],
    out: ThresholdStats,
    tile: Tile | None = None,
) -> None:
    grads = [laid_out_like(grad, weight) for grad, weight in zip(grads, weights, strict=True)]
    values, masks, device = out.values, out.bitmasks or (), weights[0].device
    alphas = None if alpha is None else alpha.float().contiguous()
    with torch.cuda.device(device):
        out.nonzeros.zero_()
        native_module().threshold_adam_cuda(
            _addresses(weights),
            [weight.numel() for weight in weights],
            _addresses(grads),
            _addresses(means),
            _addresses(squares),
            *number_rules(rules),
            DTYPES[values[0].dtype] if values else 0,
            _addresses(values),
            _addresses(masks),
            list(owners),
            0 if alphas is None else alphas.data_ptr(),
            out.nonzeros.data_ptr(),
            torch.cuda.current_stream(device).cuda_stream,
        )
    torch.autograd.graph.increment_version([*weights, *means, *squares, *values, *masks])


def _addresses(tensors: Tensors) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
