"""Soft threshold in Triton: every tensor of a component in one launch.

A program handles one block of BP weights of one tensor. Three small tables on the device say
which: the owner and the start of each block, which depend on sizes alone, and the addresses of
the tensors. Storage is float32, bfloat16 or float16 and is widened right after the load.

P: weights of one tensor. n: tensors. N: blocks of all tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import device_table, launch
from .shared import (
    TYPES,
    aligned,
    block_place,
    block_table,
    group_places,
    group_row,
    group_shape,
    program_table,
    shrunk,
    store_bits,
    tensor_at,
)


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
    VALUES: tl.constexpr,  # storage type of the values
    BP: tl.constexpr,
    COUNT: tl.constexpr,
    MASK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """s = sign(w) · max(|w| − α, 0), and with COUNT the live weights, with MASK a bit for each."""
    i_t, i_first, o_p, P = block_place(p_owners, p_starts, p_sizes, BP, ALIGNED)
    m_p = o_p < P
    p_w = tensor_at(p_addresses + i_t, DTYPE, ALIGNED)
    p_s = tensor_at(p_addresses + n + i_t, VALUES, ALIGNED)
    b_w = tl.load(p_w + o_p, mask=m_p, other=0.0).to(tl.float32)  # [BP]
    b_s, m_dead = shrunk(b_w, tl.load(p_alpha))
    tl.store(p_s + o_p, b_s.to(VALUES), mask=m_p)
    if COUNT:
        b_alive = tl.where(m_dead | (o_p >= P), 0, 1)  # [BP]
        tl.store(p_live + tl.program_id(0), tl.sum(b_alive.to(tl.int64)))
        if MASK:
            p_m = tl.load(p_addresses + 2 * n + i_t).to(tl.pointer_type(tl.uint8))
            store_bits(p_m, b_alive, i_first, P, BP)


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
    VALUES: tl.constexpr,  # storage type of the gradients that come in
    BP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """gw = g · B and partial = Σ g · sign(w) · B over one block, with B = not |w| ≤ α."""
    i_t, _, o_p, P = block_place(p_owners, p_starts, p_sizes, BP, ALIGNED)
    m_p = o_p < P
    p_w = tensor_at(p_addresses + i_t, DTYPE, ALIGNED)
    p_g = tensor_at(p_addresses + n + i_t, VALUES, ALIGNED)
    p_gw = tensor_at(p_addresses + 2 * n + i_t, DTYPE, ALIGNED)
    b_w = tl.load(p_w + o_p, mask=m_p, other=0.0).to(tl.float32)  # [BP]
    b_g = tl.load(p_g + o_p, mask=m_p, other=0.0).to(tl.float32)  # [BP]
    b_gw = tl.where(tl.abs(b_w) <= tl.load(p_alpha), 0.0, b_g)
    tl.store(p_gw + o_p, b_gw.to(DTYPE), mask=m_p)
    b_signed = tl.where(b_w < 0, -b_gw, tl.where(b_w > 0, b_gw, 0.0))  # sign(NaN) = 0, as in torch
    tl.store(p_partials + tl.program_id(0), tl.sum(b_signed))  # one per block: no atomics


@triton.jit
def soft_threshold_tiles_kernel(
    p_table,  # [n, 11] int64: weights, values, live counts, norms, sizes and strides
    p_owners,  # [N] int64
    p_firsts,  # [N] int64
    p_alpha,  # [] float32
    ROWS: tl.constexpr,
    COLS,
    DTYPE: tl.constexpr,
    VALUES: tl.constexpr,
    BT: tl.constexpr,
    PR: tl.constexpr,
    PC: tl.constexpr,
):
    """s of single weights, and for each tile how many are alive and ‖W_g‖ of all of them."""
    i_b = tl.program_id(0).to(tl.int64)
    p_row = p_table + tl.load(p_owners + i_b) * 11
    i_first = tl.load(p_firsts + i_b).to(tl.int32)
    o_w, m_w, _, o_n, m_g = group_places(p_row, i_first, ROWS, COLS, 4, BT, PR, PC)
    p_w = tensor_at(p_row, DTYPE, False)
    p_s = tensor_at(p_row + 1, VALUES, False)
    b_w = tl.load(p_w + o_w, mask=m_w, other=0.0).to(tl.float32)  # [BT, PR, PC]
    b_s, m_dead = shrunk(b_w, tl.load(p_alpha))
    tl.store(p_s + o_w, b_s.to(VALUES), mask=m_w)
    b_alive = tl.where(m_dead | (m_w == 0), 0, 1)
    tl.store(tensor_at(p_row + 2, tl.int32, False) + o_n, tl.sum(tl.sum(b_alive, 2), 1), mask=m_g)
    b_norm = tl.sqrt_rn(tl.sum(tl.sum(b_w * b_w, 2), 1))  # [BT]
    tl.store(tensor_at(p_row + 3, tl.float32, False) + o_n, b_norm, mask=m_g)


def soft_threshold_fwd(
    weights: Sequence[Tensor],
    alpha: Tensor,
    values: Sequence[Tensor],
    BP: int,
    live: Tensor | None = None,
    masks: Sequence[Tensor] = (),
) -> None:
    """Fill the outputs.

    weights, values: n dense tensors [P], laid out alike, of one storage type each   alpha: one
    value   live: [N] int64, live weights of each block   masks: n tensors [⌈P / 8⌉] uint8, needs
    live
    """
    owners, starts, sizes = block_table(tuple(w.numel() for w in weights), BP, alpha.device)
    if len(owners) == 0:
        return
    launch(
        soft_threshold_fwd_kernel,
        (len(owners),),
        *(_addresses([weights, values, masks or values], alpha), sizes, owners, starts),
        *(alpha.float(), owners if live is None else live, len(weights)),
        COUNT=live is not None,
        MASK=bool(masks),
        **_options(weights, values, BP, aligned(weights, values)),
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

    weights, grad_weights: n dense tensors [P] of one storage type   grads: n like them, of one
    type, laid out alike   alpha: one value   partials: [N] float32, in tensor and block order
    """
    owners, starts, sizes = block_table(tuple(w.numel() for w in weights), BP, alpha.device)
    if len(owners) == 0:
        return
    launch(
        soft_threshold_bwd_kernel,
        (len(owners),),
        *(_addresses([weights, grads, grad_weights], alpha), sizes, owners, starts),
        *(alpha.float(), partials, len(weights)),
        **_options(weights, grads, BP, aligned(weights, grads, grad_weights)),
    )


def soft_threshold_tiles(
    weights: Sequence[Tensor],
    alpha: Tensor,
    values: Sequence[Tensor],
    live: Sequence[Tensor],
    norms: Sequence[Tensor],
    tile: tuple[int, int],
) -> None:
    """Fill the outputs.

    weights, values: n dense tensors [K, C] or [K, C, kh, kw], laid out alike, of one type each
    live: n tensors [R, Q, T] int32   norms: the same, float32   tile: rows, columns, both ≥ 1
    """
    filled = [i for i, weight in enumerate(weights) if weight.numel() > 0]
    if not filled:
        return
    given = (weights, values, live, norms)
    rows = [
        (*(ts[i].data_ptr() for ts in given), *group_row(weights[i], tile[1], False))
        for i in filled
    ]
    shape = group_shape(*tile)
    counts = tuple(-(-row[4] // tile[0]) * row[6] * row[7] for row in rows)
    owners, firsts = program_table(counts, shape["BT"], alpha.device)
    launch(
        soft_threshold_tiles_kernel,
        (len(owners),),
        *(device_table(tuple(rows), alpha.device), owners, firsts, alpha.float()),
        ROWS=tile[0],
        COLS=tile[1],
        DTYPE=TYPES[weights[0].dtype],
        VALUES=TYPES[values[0].dtype],
        **shape,
    )


def _options(
    weights: Sequence[Tensor], values: Sequence[Tensor], BP: int, wide: bool
) -> dict[str, object]:
    types = {"DTYPE": TYPES[weights[0].dtype], "VALUES": TYPES[values[0].dtype]}
    return {**types, "BP": BP, "ALIGNED": wide, "num_warps": 4}


def _addresses(groups: Sequence[Sequence[Tensor]], alpha: Tensor) -> Tensor:
    return device_table(tuple(tuple(t.data_ptr() for t in ts) for ts in groups), alpha.device)
