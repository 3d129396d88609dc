"""Adam and the next soft threshold in Triton: every tensor of a component in one launch.

Single weights go by blocks, groups by groups; the tables are those of shared.py. Weights,
gradients and moments are float32, the values any storage type.

P: weights of one tensor. n: tensors. N: programs. R: rules. G: thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device_floats, device_table, launch
from .shared import (
    TYPES,
    aligned,
    block_place,
    block_table,
    by_width,
    group_places,
    group_row,
    group_shape,
    group_shrunk,
    program_table,
    shrunk,
    store_bits,
    tensor_at,
)


@triton.jit
def _step(p_r, p_w, p_g, p_m, p_v, o_w, m_w):
    """Adam on some weights of one tensor, in place; returns the new weights."""
    b_shrink, b_decay = tl.load(p_r), tl.load(p_r + 1)
    b_from_grad, b_pull = tl.load(p_r + 2), tl.load(p_r + 3)
    b_keep, b_rate = tl.load(p_r + 4), tl.load(p_r + 5)
    b_step, b_epsilon = tl.load(p_r + 6), tl.load(p_r + 7)
    b_w = tl.load(p_w + o_w, mask=m_w, other=0.0) * b_shrink
    b_g = tl.load(p_g + o_w, mask=m_w, other=0.0)
    b_g = tl.where(b_decay == 0.0, b_g, b_g + b_decay * b_w)  # 0 · inf would be NaN
    b_m = tl.load(p_m + o_w, mask=m_w, other=0.0)
    b_m = tl.where(b_from_grad != 0.0, b_g, b_m) + b_pull * (b_g - b_m)
    b_v = tl.load(p_v + o_w, mask=m_w, other=0.0)
    b_v = b_v * b_keep + b_g * b_rate * b_g
    b_w = b_w - b_step * tl.div_rn(b_m, tl.sqrt_rn(b_v) + b_epsilon)
    tl.store(p_m + o_w, b_m, mask=m_w)
    tl.store(p_v + o_w, b_v, mask=m_w)
    tl.store(p_w + o_w, b_w, mask=m_w)
    return b_w


@triton.jit
def threshold_adam_kernel(
    p_addresses,  # [6, n] int64: weights, gradients, means, squares, values, masks
    p_sizes,  # [n] int64
    p_owners,  # [N] int64
    p_starts,  # [N] int64
    p_rules,  # [R, 8] float32: shrink, decay, from_grad, pull, keep, rate, step, epsilon
    p_places,  # [2, n] int64: rule and threshold of each tensor
    p_alpha,  # [G] float32
    p_live,  # [N] int64
    n,
    DTYPE: tl.constexpr,
    BP: tl.constexpr,
    THRESHOLD: tl.constexpr,
    MASK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """g += λw; m = base + pull (g − m); v = β₂v + (1 − β₂)g²; w −= step m / (√v + ε); s = S(w)."""
    i_t, i_first, o_p, P = block_place(p_owners, p_starts, p_sizes, BP, ALIGNED)
    m_p = o_p < P
    p_w = tensor_at(p_addresses + i_t, tl.float32, ALIGNED)
    p_g = tensor_at(p_addresses + n + i_t, tl.float32, ALIGNED)
    p_m = tensor_at(p_addresses + 2 * n + i_t, tl.float32, ALIGNED)
    p_v = tensor_at(p_addresses + 3 * n + i_t, tl.float32, ALIGNED)
    b_w = _step(p_rules + 8 * tl.load(p_places + i_t), p_w, p_g, p_m, p_v, o_p, m_p)  # [BP]
    if THRESHOLD:
        p_s = tensor_at(p_addresses + 4 * n + i_t, DTYPE, ALIGNED)
        b_s, m_dead = shrunk(b_w, tl.load(p_alpha + tl.load(p_places + n + i_t)))
        tl.store(p_s + o_p, b_s.to(DTYPE), mask=m_p)
        b_alive = tl.where(m_dead | (o_p >= P), 0, 1)  # [BP]
        tl.store(p_live + tl.program_id(0), tl.sum(b_alive.to(tl.int64)))
        if MASK:
            p_bits = tl.load(p_addresses + 5 * n + i_t).to(tl.pointer_type(tl.uint8))
            store_bits(p_bits, b_alive, i_first, P, BP)


@triton.jit
def threshold_adam_groups_kernel(
    p_table,  # [n, 15] int64: weights, gradients, means, squares, values, norms, rule and
    # threshold of the tensor, sizes and strides
    p_owners,  # [N] int64
    p_firsts,  # [N] int64
    p_rules,  # [R, 8] float32, as above
    p_alpha,  # [G] float32
    p_live,  # [N] int64
    ROWS: tl.constexpr,
    COLS,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
    PR: tl.constexpr,
    PC: tl.constexpr,
):
    """The same step, then S = W_g · max(0, 1 − α √n / ‖W_g‖), ‖W_g‖ and the live weights."""
    i_b = tl.program_id(0).to(tl.int64)
    p_row = p_table + tl.load(p_owners + i_b) * 15
    i_first = tl.load(p_firsts + i_b).to(tl.int32)
    o_w, m_w, n, o_n, m_g = group_places(p_row, i_first, ROWS, COLS, 8, BT, PR, PC)
    p_w = tensor_at(p_row, tl.float32, False)
    p_g = tensor_at(p_row + 1, tl.float32, False)
    p_m = tensor_at(p_row + 2, tl.float32, False)
    p_v = tensor_at(p_row + 3, tl.float32, False)
    b_w = _step(p_rules + 8 * tl.load(p_row + 6), p_w, p_g, p_m, p_v, o_w, m_w)  # [BT, PR, PC]
    # What a mask left out was stepped too: zero, but for a NaN that a rule may hold.
    b_w = tl.where(m_w, b_w, 0.0)
    b_s, b_norm, m_dead = group_shrunk(b_w, n, tl.load(p_alpha + tl.load(p_row + 7)))
    tl.store(tensor_at(p_row + 4, DTYPE, False) + o_w, b_s.to(DTYPE), mask=m_w)
    tl.store(tensor_at(p_row + 5, tl.float32, False) + o_n, b_norm, mask=m_g)
    b_alive = tl.where(m_dead | (m_g == 0), 0, n.to(tl.int64))
    tl.store(p_live + i_b, tl.sum(b_alive))


def threshold_adam(
    state: Sequence[Sequence[Tensor]],
    rules: Sequence[float],
    rule_of: Sequence[int],
    alpha: Tensor | None,
    owners: Sequence[int],
    values: Sequence[Tensor],
    masks: Sequence[Tensor],
    nonzeros: Tensor,
    BP: int,
) -> None:
    """Step the weights and fill the outputs.

    state:  weights, gradients, means, squares: n dense float32 tensors [P] each, laid out alike
    rules:  8 R numbers, see csrc/cpu/threshold_adam.h     rule_of: [n]     owners: [n], or empty
    alpha:  [G] or None, and then there are no outputs     nonzeros: [n] int64, live weights
    values: n tensors [P] of one storage type     masks: n tensors [⌈P / 8⌉] uint8, or none
    """
    weights = state[0]
    device, n = weights[0].device, len(weights)
    blocks, starts, sizes = block_table(tuple(w.numel() for w in weights), BP, device)
    live = torch.empty(len(blocks), dtype=torch.int64, device=device)
    if len(blocks) > 0:
        columns = [*state, values or weights, masks or weights]
        numbers = device_floats(rules, device)
        launch(
            threshold_adam_kernel,
            (len(blocks),),
            device_table(tuple(tuple(t.data_ptr() for t in ts) for ts in columns), device),
            *(sizes, blocks, starts, numbers),
            device_table((tuple(rule_of), tuple(owners) or (0,) * n), device),
            *(numbers if alpha is None else alpha.float(), live, n),
            DTYPE=TYPES[values[0].dtype] if values else tl.float32,
            BP=BP,
            THRESHOLD=alpha is not None,
            MASK=bool(masks),
            ALIGNED=aligned(*state, values),
            num_warps=4,
        )
    if alpha is not None:
        nonzeros.zero_().index_add_(0, blocks, live)  # integers: exact in any order


def threshold_adam_groups(
    state: Sequence[Sequence[Tensor]],
    rules: Sequence[float],
    rule_of: Sequence[int],
    alpha: Tensor,
    owners: Sequence[int],
    values: Sequence[Tensor],
    norms: Sequence[Tensor],
    nonzeros: Tensor,
    tile: tuple[int, int],
) -> None:
    """As `threshold_adam`, with group thresholds.

    state:  n tensors [K, C] or [K, C, kh, kw] each   norms: n tensors [R, Q, T] float32
    tile:   rows, columns; columns 0 for whole rows
    """
    device = alpha.device
    nonzeros.zero_()
    # One launch for each width of group; whole rows differ in theirs.
    for columns, members in by_width(state[0], tile).items():
        rows = [
            (
                *(ts[i].data_ptr() for ts in (*state, values, norms)),
                *(rule_of[i], owners[i]),
                *group_row(state[0][i], columns, tile[1] == 0),
            )
            for i in members
        ]
        shape = group_shape(tile[0], columns)
        counts = tuple(-(-row[8] // tile[0]) * row[10] * row[11] for row in rows)
        programs, firsts = program_table(counts, shape["BT"], device)
        live = torch.empty(len(programs), dtype=torch.int64, device=device)
        launch(
            threshold_adam_groups_kernel,
            (len(programs),),
            *(device_table(tuple(rows), device), programs, firsts),
            *(device_floats(rules, device), alpha.float(), live),
            ROWS=tile[0],
            COLS=columns,
            DTYPE=TYPES[values[0].dtype],
            **shape,
        )
        place = device_table((tuple(members),), device)[0]
        nonzeros.index_add_(0, place[programs], live)  # integers: exact in any order
