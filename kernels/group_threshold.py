"""Group soft threshold in Triton: every group of every tensor of a component in one launch.

A program handles BT neighbouring groups of one tensor, along the input channels of one tap. A
table on the device holds a row for each tensor, two more the owner and first group of a program.

K, C, T: output channels, input channels and taps of a tensor; whole rows count taps as channels.
R, Q: groups along output and input channels. N: programs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device_table, launch
from .shared import (
    TYPES,
    by_width,
    group_places,
    group_row,
    group_shape,
    group_shrunk,
    program_table,
    tensor_at,
)


@triton.jit
def group_threshold_fwd_kernel(
    p_table,  # [n, 11] int64: weights, values, norms, none, sizes and strides
    p_owners,  # [N] int64
    p_firsts,  # [N] int64
    p_alpha,  # [] float32
    ROWS: tl.constexpr,
    COLS,
    DTYPE: tl.constexpr,
    VALUES: tl.constexpr,  # storage type of the values
    BT: tl.constexpr,
    PR: tl.constexpr,
    PC: tl.constexpr,
):
    """S = W_g · max(0, 1 − α √n / ‖W_g‖), and ‖W_g‖."""
    i_b = tl.program_id(0).to(tl.int64)
    p_row = p_table + tl.load(p_owners + i_b) * 11
    i_first = tl.load(p_firsts + i_b).to(tl.int32)
    o_w, m_w, n, o_n, m_g = group_places(p_row, i_first, ROWS, COLS, 4, BT, PR, PC)
    b_w = tl.load(tensor_at(p_row, DTYPE, False) + o_w, mask=m_w, other=0.0)  # [BT, PR, PC]
    b_s, b_norm, _ = group_shrunk(b_w.to(tl.float32), n, tl.load(p_alpha))
    tl.store(tensor_at(p_row + 1, VALUES, False) + o_w, b_s.to(VALUES), mask=m_w)
    tl.store(tensor_at(p_row + 2, tl.float32, False) + o_n, b_norm, mask=m_g)


@triton.jit
def group_threshold_bwd_kernel(
    p_table,  # [n, 11] int64: weights, gradients, norms, gradients of the weights, sizes, strides
    p_owners,
    p_firsts,
    p_alpha,
    p_partials,  # [N] float32
    ROWS: tl.constexpr,
    COLS,
    DTYPE: tl.constexpr,
    VALUES: tl.constexpr,  # storage type of the gradients that come in
    BT: tl.constexpr,
    PR: tl.constexpr,
    PC: tl.constexpr,
):
    """gw = B · [(1 − t) g + t û (û·g)], and Σ B √n (û·g) over the program's groups."""
    i_b = tl.program_id(0).to(tl.int64)
    p_row = p_table + tl.load(p_owners + i_b) * 11
    i_first = tl.load(p_firsts + i_b).to(tl.int32)
    o_w, m_w, n, o_n, m_g = group_places(p_row, i_first, ROWS, COLS, 4, BT, PR, PC)
    b_norm = tl.load(tensor_at(p_row + 2, tl.float32, False) + o_n, mask=m_g, other=0.0)  # [BT]
    b_root = tl.sqrt_rn(n)
    b_alpha = tl.load(p_alpha)
    m_dead = (tl.div_rn(b_norm, b_root) <= b_alpha) | (m_g == 0)
    b_safe = tl.where(m_dead, 1.0, b_norm)
    b_t = tl.div_rn(b_alpha * b_root, b_safe)
    b_w = tl.load(tensor_at(p_row, DTYPE, False) + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_g = tl.load(tensor_at(p_row + 1, VALUES, False) + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_along = tl.div_rn(tl.sum(tl.sum(b_w * b_g, 2), 1), b_safe)  # û · g
    b_towards = tl.div_rn(b_t * b_along, b_safe)[:, None, None]
    b_gw = (1.0 - b_t)[:, None, None] * b_g + b_towards * b_w
    b_gw = tl.where(m_dead[:, None, None], 0.0, b_gw)
    tl.store(tensor_at(p_row + 3, DTYPE, False) + o_w, b_gw.to(DTYPE), mask=m_w)
    tl.store(p_partials + i_b, tl.sum(tl.where(m_dead, 0.0, b_root * b_along), 0))


def group_threshold_fwd(
    weights: Sequence[Tensor],
    alpha: Tensor,
    values: Sequence[Tensor],
    norms: Sequence[Tensor],
    tile: tuple[int, int],
) -> None:
    """Fill values and norms.

    weights, values: n dense tensors [K, C] or [K, C, kh, kw], laid out alike, of one type each
    alpha: [] float32   norms: n tensors [R, Q, T] float32   tile: rows, columns; 0 for whole rows
    """
    _launch(group_threshold_fwd_kernel, (weights, values, norms, norms), alpha, tile, False)


def group_threshold_bwd(
    weights: Sequence[Tensor],
    alpha: Tensor,
    grads: Sequence[Tensor],
    norms: Sequence[Tensor],
    grad_weights: Sequence[Tensor],
    tile: tuple[int, int],
) -> Tensor:
    """Fill grad_weights; returns what sums to −grad_α, [N] float32, in a fixed order."""
    tensors = (weights, grads, norms, grad_weights)
    return _launch(group_threshold_bwd_kernel, tensors, alpha, tile, True)


def _launch(
    kernel: object,
    tensors: Sequence[Sequence[Tensor]],
    alpha: Tensor,
    tile: tuple[int, int],
    sums: bool,
) -> Tensor:
    """One launch for each width of group; whole rows differ in theirs."""
    partials = []
    for columns, members in by_width(tensors[0], tile).items():
        rows = [
            (
                *(group[i].data_ptr() for group in tensors),
                *group_row(tensors[0][i], columns, tile[1] == 0),
            )
            for i in members
        ]
        shape = group_shape(tile[0], columns)
        counts = tuple(-(-row[4] // tile[0]) * row[6] * row[7] for row in rows)
        owners, firsts = program_table(counts, shape["BT"], alpha.device)
        given = [device_table(tuple(rows), alpha.device), owners, firsts, alpha]
        if sums:
            partials.append(torch.empty(len(owners), dtype=torch.float32, device=alpha.device))
            given.append(partials[-1])
        launch(
            kernel,
            (len(owners),),
            *given,
            ROWS=tile[0],
            COLS=columns,
            DTYPE=TYPES[tensors[0][members[0]].dtype],
            VALUES=TYPES[tensors[1][members[0]].dtype],
            **shape,
        )
    return torch.cat(partials) if partials else alpha.new_zeros(0)
