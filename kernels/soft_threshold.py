"""Soft threshold in Triton: every tensor of a component in one launch.

A program handles one block of BP weights of one tensor. Three small tables on the device say
which: the owner and the start of each block, which depend on sizes alone, and the addresses of
the tensors. Storage is float32, bfloat16 or float16 and is widened right after the load.

P: weights of one tensor. n: tensors. N: blocks of all tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device_table

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def soft_threshold_fwd_kernel(
    p_addresses,  # [3, n] int64: weights, values, masks
    p_sizes,  # [n] int64
    p_owners,  # [N] int64
    p_starts,  # [N] int64
    p_alpha,  # [] float32
    p_live,  # [N] int64
    n,
    DTYPE: tl.constexpr,
    BP: tl.constexpr,
    COUNT: tl.constexpr,
    MASK: tl.constexpr,
):
    """s = sign(w) · max(|w| − α, 0), and with COUNT the live weights, with MASK a bit for each."""
    i_b = tl.program_id(0).to(tl.int64)
    i_t = tl.load(p_owners + i_b)
    P = tl.load(p_sizes + i_t)
    o_p = tl.load(p_starts + i_b) + tl.arange(0, BP)  # [BP]
    m_p = o_p < P
    p_w = tl.load(p_addresses + i_t).to(tl.pointer_type(DTYPE))
    p_s = tl.load(p_addresses + n + i_t).to(tl.pointer_type(DTYPE))
    b_alpha = tl.load(p_alpha)
    b_w = tl.load(p_w + o_p, mask=m_p, other=0.0).to(tl.float32)  # [BP]
    m_dead = tl.abs(b_w) <= b_alpha
    b_s = tl.where(m_dead, 0.0, tl.where(b_w < 0, b_w + b_alpha, b_w - b_alpha))
    tl.store(p_s + o_p, b_s.to(DTYPE), mask=m_p)
    if COUNT:
        b_alive = tl.where(m_dead | (o_p >= P), 0, 1)  # [BP]
        tl.store(p_live + i_b, tl.sum(b_alive.to(tl.int64)))
        if MASK:
            p_m = tl.load(p_addresses + 2 * n + i_t).to(tl.pointer_type(tl.uint8))
            b_bits = tl.reshape(b_alive, (BP // 8, 8)) << tl.arange(0, 8)[None, :]
            o_m = tl.load(p_starts + i_b) // 8 + tl.arange(0, BP // 8)  # [BP / 8]
            tl.store(p_m + o_m, tl.sum(b_bits, axis=1).to(tl.uint8), mask=o_m * 8 < P)


@triton.jit
def soft_threshold_bwd_kernel(
    p_addresses,  # [3, n] int64: weights, gradients, gradients of the weights
    p_sizes,  # [n] int64
    p_owners,  # [N] int64
    p_starts,  # [N] int64
    p_alpha,  # [] float32
    p_partials,  # [N] float32
    n,
    DTYPE: tl.constexpr,
    BP: tl.constexpr,
):
    """gw = g · B and partial = Σ g · sign(w) · B over one block, with B = not |w| ≤ α."""
    i_b = tl.program_id(0).to(tl.int64)
    i_t = tl.load(p_owners + i_b)
    P = tl.load(p_sizes + i_t)
    o_p = tl.load(p_starts + i_b) + tl.arange(0, BP)  # [BP]
    m_p = o_p < P
    p_w = tl.load(p_addresses + i_t).to(tl.pointer_type(DTYPE))
    p_g = tl.load(p_addresses + n + i_t).to(tl.pointer_type(DTYPE))
    p_gw = tl.load(p_addresses + 2 * n + i_t).to(tl.pointer_type(DTYPE))
    b_alpha = tl.load(p_alpha)
    b_w = tl.load(p_w + o_p, mask=m_p, other=0.0).to(tl.float32)  # [BP]
    b_g = tl.load(p_g + o_p, mask=m_p, other=0.0).to(tl.float32)  # [BP]
    b_gw = tl.where(tl.abs(b_w) <= b_alpha, 0.0, b_g)
    tl.store(p_gw + o_p, b_gw.to(DTYPE), mask=m_p)
    b_signed = tl.where(b_w < 0, -b_gw, tl.where(b_w > 0, b_gw, 0.0))  # sign(NaN) = 0, as in torch
    tl.store(p_partials + i_b, tl.sum(b_signed))  # one per block: no atomics


def soft_threshold_fwd(
    weights: Sequence[Tensor],
    alpha: Tensor,
    values: Sequence[Tensor],
    BP: int,
    live: Tensor | None = None,
    masks: Sequence[Tensor] = (),
) -> None:
    """Fill the outputs.

    weights, values: n dense tensors [P] of one storage type, laid out alike   alpha: one value
    live: [N] int64, live weights of each block   masks: n tensors [⌈P / 8⌉] uint8, needs live
    """
    owners, starts, sizes = block_table(tuple(w.numel() for w in weights), BP, alpha.device)
    if len(owners) == 0:
        return
    addresses = _addresses([weights, values, masks or values], alpha.device)
    tables = (addresses, sizes, owners, starts, alpha.float(), owners if live is None else live)
    options = {"DTYPE": TYPES[weights[0].dtype], "BP": BP, "num_warps": 4}
    soft_threshold_fwd_kernel[(len(owners),)](
        *tables, len(weights), COUNT=live is not None, MASK=bool(masks), **options
    )


def soft_threshold_bwd(
    weights: Sequence[Tensor],
    alpha: Tensor,
    grads: Sequence[Tensor],
    grad_weights: Sequence[Tensor],
    partials: Tensor,
    BP: int,
) -> None:
    """Fill the last two outputs.

    weights, grads, grad_weights: n dense tensors [P] of one storage type, laid out alike
    alpha: one value   partials: [N] float32, in tensor and block order
    """
    owners, starts, sizes = block_table(tuple(w.numel() for w in weights), BP, alpha.device)
    if len(owners) == 0:
        return
    addresses = _addresses([weights, grads, grad_weights], alpha.device)
    soft_threshold_bwd_kernel[(len(owners),)](
        *(addresses, sizes, owners, starts, alpha.float(), partials, len(weights)),
        DTYPE=TYPES[weights[0].dtype],
        BP=BP,
        num_warps=4,
    )


@lru_cache(maxsize=256)  # a model has few components, and their sizes do not change
def block_table(
    sizes: tuple[int, ...], BP: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Owner and start of every block, [N] each, and the sizes, [n]; int64 on the device."""
    blocks = torch.tensor([-(-size // BP) for size in sizes])  # [n]
    owners = torch.repeat_interleave(torch.arange(len(sizes)), blocks)
    firsts = torch.cumsum(blocks, 0) - blocks
    starts = (torch.arange(len(owners)) - firsts[owners]) * BP
    return owners.to(device), starts.to(device), torch.tensor(sizes).to(device)


def _addresses(groups: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    return device_table(tuple(tuple(t.data_ptr() for t in ts) for ts in groups), device)
