"""How each backend computes soft_threshold; the op itself stands in soft_threshold.py.

Every function takes the tensors of a whole component. Outputs come from `torch.empty*`, or from
memory.py which fills as torch does, so that a test that poisons fresh memory sees what a kernel
leaves unwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemtl.ops.availability import DTYPES, INTERPRETING, native_module, why_not_triton
from sparsemtl.ops.layout import dense, laid_out_like, ordered_like
from sparsemtl.ops.memory import empty_like
from sparsemtl.ops.tiles import LARGEST_GROUP, Tile, grid, group_size, why_not_strides

if TYPE_CHECKING:
    from sparsemtl.ops.soft_threshold import ThresholdStats

Tensors = Sequence[Tensor]
Gradients = tuple[tuple[Tensor, ...], Tensor]  # of each weight; of alpha

TRITON_BLOCK = 1024  # weights of one program: 8 values in each lane of four warps


def to_arithmetic(tensor: Tensor) -> Tensor:
    """Widen storage types to float32; leave float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


# Reference: the gradients of soft_threshold_reference, written out.


def reference_backward(weights: Tensors, alpha: Tensor, grads: Tensors) -> Gradients:
    grad_weights, total = [], torch.zeros((), dtype=torch.float64, device=alpha.device)
    for weight, grad in zip(weights, grads, strict=True):
        w = to_arithmetic(weight)
        masked = torch.where(w.abs() <= alpha.reshape(()).to(w.dtype), 0.0, to_arithmetic(grad))
        total = total - (masked * w.sign()).sum(dtype=torch.float64)
        grad_weights.append(masked.to(weight.dtype))
    return tuple(grad_weights), total.to(alpha.dtype).reshape(alpha.shape)


def count_reference(
    weights: Tensors, alpha: Tensor, bitmask: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Live weights of each tensor and, if asked for, their bits; see ThresholdStats."""
    alive = []
    for weight in weights:
        w = to_arithmetic(dense(weight))
        in_memory = w.as_strided((w.numel(),), (1,))
        alive.append(~(in_memory.abs() <= alpha.reshape(()).to(w.dtype)))
    counts = torch.stack([a.sum() for a in alive])
    return counts, tuple(_pack_bits(a) for a in alive) if bitmask else None


def _pack_bits(alive: Tensor) -> Tensor:
    padded = torch.zeros(-(-alive.numel() // 8) * 8, dtype=torch.uint8, device=alive.device)
    padded[: alive.numel()] = alive
    place = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=alive.device)
    return (padded.view(-1, 8) * place).sum(1, dtype=torch.uint8)


# Which arguments a backend takes.


def _why_not(
    why_not_device: Callable[[Tensor | None], str | None],
    weights: Sequence[Tensor],
    dtype: torch.dtype | None,
) -> str | None:
    asked = why_not_triton_values if why_not_device is why_not_triton else why_not_values
    return why_not_device(weights[0] if weights else None) or asked(dtype)


def why_not_values(dtype: torch.dtype | None) -> str | None:
    """Why a kernel cannot write values of this type; None if it can."""
    if dtype is None or dtype in DTYPES:
        return None
    return f"values are {dtype}, it gives float32, bfloat16 and float16"


def why_not_triton_values(dtype: torch.dtype | None) -> str | None:
    """The same for Triton, whose interpreter cannot store bfloat16."""
    if INTERPRETING and dtype is torch.bfloat16:
        return "values are torch.bfloat16, which the interpreter truncates"
    return why_not_values(dtype)


def unless_type(why_not_device: Callable[[Tensor | None], str | None]) -> Callable[..., Any]:
    """Turn a question about one tensor into `why_not` of this op's arguments."""

    def why_not(
        weights: Sequence[Tensor] = (),
        alpha: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> str | None:
        return _why_not(why_not_device, weights, dtype)

    return why_not


def unless_values(
    why_not_device: Callable[[Tensor | None], str | None], tiles: bool = False
) -> Callable[..., Any]:
    """The same for the statistics; tiles: whether the backend counts them."""

    def why_not(
        weights: Sequence[Tensor] = (),
        alpha: Tensor | None = None,
        bitmask: bool = False,
        dtype: torch.dtype | None = None,
        tile: Tile | None = None,
    ) -> str | None:
        reason = _why_not(why_not_device, weights, dtype)
        if reason is not None or tile is None:
            return reason
        return why_not_groups(weights, tile) if tiles else "it does not count tiles"

    return why_not


def why_not_groups(weights: Tensors, tile: Tile, most: int = LARGEST_GROUP) -> str | None:
    """Why the Triton kernels over groups cannot take these weights; None if they can."""
    for weight in weights:
        columns = tile.columns or (weight.numel() // weight.shape[0] if weight.numel() else 1)
        if group_size(tile.rows, columns) > most:
            return f"a group has {tile.rows} x {columns} weights, it takes {most} in all"
        reason = why_not_strides(weight, tile)
        if reason is not None:
            return reason
    return None


# Native: csrc/cpu/soft_threshold.cpp.


def _addresses(tensors: Tensors) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def native(weights: Tensors, alpha: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    return _as_type(_native_forward(weights, alpha, None, ()), dtype)


def native_stats(
    weights: Tensors,
    alpha: Tensor,
    bitmask: bool,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> ThresholdStats:
    counts = torch.empty(len(weights), dtype=torch.int64, device="cpu")
    sizes = [-(-w.numel() // 8) for w in weights]
    masks = tuple(torch.empty(size, dtype=torch.uint8, device="cpu") for size in sizes)
    values = _native_forward(weights, alpha, counts, masks if bitmask else ())
    return _stats(_as_type(values, dtype), counts, masks if bitmask else None)


def _as_type(values: tuple[Tensor, ...], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """The CPU's kernels write the weights' type; narrowing is a pass of its own there."""
    return values if dtype is None else tuple([value.to(dtype) for value in values])


def _stats(*fields: Any) -> ThresholdStats:
    from sparsemtl.ops.soft_threshold import ThresholdStats

    return ThresholdStats(*fields)


def _native_forward(
    weights: Tensors, alpha: Tensor, counts: Tensor | None, masks: Tensors
) -> tuple[Tensor, ...]:
    weights = [dense(weight) for weight in weights]  # named: an address borrows, it does not own
    values = tuple([empty_like(weight) for weight in weights])
    native_module().soft_threshold_forward(
        DTYPES[weights[0].dtype],
        _addresses(weights),
        [weight.numel() for weight in weights],
        _addresses(values),
        alpha.item(),
        _addresses(masks),
        0 if counts is None else counts.data_ptr(),
        torch.get_num_threads(),
    )
    return values


def native_backward(weights: Tensors, alpha: Tensor, grads: Tensors) -> Gradients:
    weights = [dense(weight) for weight in weights]
    grads = [laid_out_like(grad, weight) for grad, weight in zip(grads, weights, strict=True)]
    grad_weights = tuple([empty_like(weight) for weight in weights])
    sizes = [weight.numel() for weight in weights]
    chunks = sum(-(-size // native_module().SOFT_THRESHOLD_CHUNK) for size in sizes)
    sums = torch.empty(chunks, dtype=torch.float64, device="cpu")
    grad_alpha = native_module().soft_threshold_backward(
        DTYPES[weights[0].dtype],
        _addresses(weights),
        sizes,
        _addresses(grads),
        _addresses(grad_weights),
        alpha.item(),
        sums.data_ptr(),
        chunks,
        torch.get_num_threads(),
    )
    return grad_weights, torch.full_like(alpha, grad_alpha)


# Triton: kernels/soft_threshold.py. Imported at first use: triton takes long to load.


def triton(weights: Tensors, alpha: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    from sparsemtl.kernels.soft_threshold import soft_threshold_fwd

    weights = [dense(weight) for weight in weights]
    values = tuple(torch.empty_like(weight, dtype=dtype) for weight in weights)
    soft_threshold_fwd(weights, alpha, values, TRITON_BLOCK)
    return values


def triton_stats(
    weights: Tensors,
    alpha: Tensor,
    bitmask: bool,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> ThresholdStats:
    from sparsemtl.kernels.shared import block_table
    from sparsemtl.kernels.soft_threshold import soft_threshold_fwd, soft_threshold_tiles

    weights = [dense(weight) for weight in weights]
    device = alpha.device
    values = tuple(torch.empty_like(weight, dtype=dtype) for weight in weights)
    if tile is not None:
        places = [(grid(w.shape, tile), device) for w in weights]
        tiles = tuple(torch.empty(p, dtype=torch.int32, device=d) for p, d in places)
        norms = tuple(torch.empty(p, dtype=torch.float32, device=d) for p, d in places)
        soft_threshold_tiles(weights, alpha, values, tiles, norms, tile)
        return _stats(values, torch.stack([t.sum() for t in tiles]), None, norms, tiles)
    masks = tuple(
        torch.empty(-(-weight.numel() // 8), dtype=torch.uint8, device=device) for weight in weights
    )
    owner = block_table(tuple(w.numel() for w in weights), TRITON_BLOCK, device)[0]
    live = torch.empty(len(owner), dtype=torch.int64, device=device)  # of each block
    soft_threshold_fwd(weights, alpha, values, TRITON_BLOCK, live, masks if bitmask else ())
    counts = torch.zeros(len(weights), dtype=torch.int64, device=device)
    counts.index_add_(0, owner, live)  # integers: exact in any order
    return _stats(values, counts, masks if bitmask else None)


def triton_backward(weights: Tensors, alpha: Tensor, grads: Tensors) -> Gradients:
    from sparsemtl.kernels.soft_threshold import soft_threshold_bwd

    weights = [dense(weight) for weight in weights]
    grads = [ordered_like(grad, weight) for grad, weight in zip(grads, weights, strict=True)]
    grad_weights = tuple(torch.empty_like(weight) for weight in weights)
    blocks = sum(-(-weight.numel() // TRITON_BLOCK) for weight in weights)
    partials = torch.empty(blocks, dtype=torch.float32, device=alpha.device)
    soft_threshold_bwd(weights, alpha, grads, grad_weights, partials, TRITON_BLOCK)
    total = partials.sum(dtype=torch.float64)  # one order for one shape, no atomics
    return grad_weights, (-total).to(alpha.dtype).reshape(alpha.shape)


# CUDA C++: csrc/cuda/soft_threshold.cu.


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def cuda(weights: Tensors, alpha: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    weights, threshold = [dense(weight) for weight in weights], alpha.float()
    values = tuple(torch.empty_like(weight, dtype=dtype) for weight in weights)
    with torch.cuda.device(alpha.device):
        native_module().soft_threshold_forward_cuda(
            DTYPES[weights[0].dtype],
            DTYPES[values[0].dtype],
            _addresses(weights),
            [weight.numel() for weight in weights],
            _addresses(values),
            threshold.data_ptr(),
            _stream(alpha.device),
        )
    return values


def cuda_backward(weights: Tensors, alpha: Tensor, grads: Tensors) -> Gradients:
    weights, threshold = [dense(weight) for weight in weights], alpha.float()
    grads = [ordered_like(grad, weight) for grad, weight in zip(grads, weights, strict=True)]
    grad_weights = tuple(torch.empty_like(weight) for weight in weights)
    sizes = [weight.numel() for weight in weights]
    chunks = sum(-(-size // native_module().SOFT_THRESHOLD_CUDA_CHUNK) for size in sizes)
    sums = torch.empty(chunks, dtype=torch.float64, device=alpha.device)
    total = torch.empty((), dtype=torch.float64, device=alpha.device)
    with torch.cuda.device(alpha.device):
        native_module().soft_threshold_backward_cuda(
            DTYPES[weights[0].dtype],
            DTYPES[grads[0].dtype],
            _addresses(weights),
            sizes,
            _addresses(grads),
            _addresses(grad_weights),
            threshold.data_ptr(),
            sums.data_ptr(),
            total.data_ptr(),
            _stream(alpha.device),
        )
    return grad_weights, total.to(alpha.dtype).reshape(alpha.shape)
