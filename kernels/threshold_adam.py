"""Adam and the next soft threshold in Triton: every tensor of a component in one launch.

A program handles one block of BP weights of one tensor; the tables are those of soft_threshold.
Weights, gradients and moments are float32, the values any storage type.

P: weights of one tensor. n: tensors. N: blocks of all tensors. R: rules. G: thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import device_table

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
):
    """g += λw; m = base + pull (g − m); v = β₂v + (1 − β₂)g²; w −= step m / (√v + ε); s = S(w)."""
    i_b = tl.program_id(0).to(tl.int64)
    i_t = tl.load(p_owners + i_b)
    P = tl.load(p_sizes + i_t)
    o_p = tl.load(p_starts + i_b) + tl.arange(0, BP)  # [BP]
    m_p = o_p < P
    p_w = tl.load(p_addresses + i_t).to(tl.pointer_type(tl.float32))
    p_g = tl.load(p_addresses + n + i_t).to(tl.pointer_type(tl.float32))
    p_m = tl.load(p_addresses + 2 * n + i_t).to(tl.pointer_type(tl.float32))
    p_v = tl.load(p_addresses + 3 * n + i_t).to(tl.pointer_type(tl.float32))
    p_r = p_rules + 8 * tl.load(p_places + i_t)
    b_shrink, b_decay = tl.load(p_r), tl.load(p_r + 1)
    b_from_grad, b_pull = tl.load(p_r + 2), tl.load(p_r + 3)
    b_keep, b_rate = tl.load(p_r + 4), tl.load(p_r + 5)
    b_step, b_epsilon = tl.load(p_r + 6), tl.load(p_r + 7)

    b_w = tl.load(p_w + o_p, mask=m_p, other=0.0) * b_shrink  # [BP]
    b_g = tl.load(p_g + o_p, mask=m_p, other=0.0)  # [BP]
    b_g = tl.where(b_decay == 0.0, b_g, b_g + b_decay * b_w)  # 0 · inf would be NaN
    b_m = tl.load(p_m + o_p, mask=m_p, other=0.0)  # [BP]
    b_m = tl.where(b_from_grad != 0.0, b_g, b_m) + b_pull * (b_g - b_m)
    b_v = tl.load(p_v + o_p, mask=m_p, other=0.0)  # [BP]
    b_v = b_v * b_keep + b_g * b_rate * b_g
    b_w = b_w - b_step * tl.div_rn(b_m, tl.sqrt_rn(b_v) + b_epsilon)
    tl.store(p_m + o_p, b_m, mask=m_p)
    tl.store(p_v + o_p, b_v, mask=m_p)
    tl.store(p_w + o_p, b_w, mask=m_p)

    if THRESHOLD:
        p_s = tl.load(p_addresses + 4 * n + i_t).to(tl.pointer_type(DTYPE))
        b_alpha = tl.load(p_alpha + tl.load(p_places + n + i_t))
        m_dead = tl.abs(b_w) <= b_alpha
        b_s = tl.where(m_dead, 0.0, tl.where(b_w < 0, b_w + b_alpha, b_w - b_alpha))
        tl.store(p_s + o_p, b_s.to(DTYPE), mask=m_p)
        b_alive = tl.where(m_dead | (o_p >= P), 0, 1)  # [BP]
        tl.store(p_live + i_b, tl.sum(b_alive.to(tl.int64)))
        if MASK:
            p_m8 = tl.load(p_addresses + 5 * n + i_t).to(tl.pointer_type(tl.uint8))
            b_bits = tl.reshape(b_alive, (BP // 8, 8)) << tl.arange(0, 8)[None, :]
            o_m = tl.load(p_starts + i_b) // 8 + tl.arange(0, BP // 8)  # [BP / 8]
            tl.store(p_m8 + o_m, tl.sum(b_bits, axis=1).to(tl.uint8), mask=o_m * 8 < P)


def threshold_adam(
    tables: tuple[Tensor, Tensor, Tensor],
    state: Sequence[Sequence[Tensor]],
    rules: Sequence[float],
    rule_of: Sequence[int],
    alpha: Tensor | None,
    owners: Sequence[int],
    values: Sequence[Tensor],
    masks: Sequence[Tensor],
    live: Tensor | None,
    BP: int,
) -> None:
    """Step the weights and fill the outputs.

    tables: owners, starts and sizes, see `block_table` of soft_threshold
    state:  weights, gradients, means, squares: n dense float32 tensors [P] each, laid out alike
    rules:  8 R numbers, see csrc/cpu/threshold_adam.h     rule_of: [n]     owners: [n], or empty
    alpha:  [G] or None, and then there are no outputs     live: [N] int64, live weights of a block
    values: n tensors [P] of one storage type     masks: n tensors [⌈P / 8⌉] uint8, or none
    """
    weights = state[0]
    device, n = weights[0].device, len(weights)
    block_owners, starts, sizes = tables
    if len(block_owners) == 0:
        return
    columns = [*state, values or weights, masks or weights]
    addresses = device_table(tuple(tuple(t.data_ptr() for t in ts) for ts in columns), device)
    numbers = torch.tensor(rules, dtype=torch.float32, device=device)
    places = device_table((tuple(rule_of), tuple(owners) or (0,) * n), device)
    threshold_adam_kernel[(len(block_owners),)](
        *(addresses, sizes, block_owners, starts, numbers, places),
        *(numbers if alpha is None else alpha.float(), block_owners if live is None else live, n),
        DTYPE=TYPES[values[0].dtype] if values else tl.float32,
        BP=BP,
        THRESHOLD=alpha is not None,
        MASK=bool(masks),
        num_warps=4,
    )
