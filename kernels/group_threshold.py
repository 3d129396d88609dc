"""Group soft threshold in Triton: every group of every tensor of a component in one launch.

A program handles BT neighbouring groups of one tensor, along the input channels of one tap. A
table on the device holds a row for each tensor, two more the owner and first group of a program.

K, C, T: output channels, input channels and taps of a tensor; whole rows count taps as channels.
R, Q: groups along output and input channels. N: programs.
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
PROGRAM = 512  # weights of one program, unless a group has more


@triton.jit
def _places(p_row, i_first, ROWS, COLS, BT: tl.constexpr, PR: tl.constexpr, PC: tl.constexpr):
    """Offsets, masks and sizes of a program's groups: [BT, PR, PC], the same, [BT]."""
    # A tensor holds fewer than 2^31 weights: offsets within it are 32 bits, which saves registers.
    K, C = tl.load(p_row + 4).to(tl.int32), tl.load(p_row + 5).to(tl.int32)
    T, Q = tl.load(p_row + 6).to(tl.int32), tl.load(p_row + 7).to(tl.int32)
    s_k, s_c = tl.load(p_row + 8).to(tl.int32), tl.load(p_row + 9).to(tl.int32)
    o_g = i_first + tl.arange(0, BT)  # groups in the order r, t, q
    i_q, i_rt = o_g % Q, o_g // Q
    i_t, i_r = i_rt % T, i_rt // T
    o_r = i_r[:, None] * ROWS + tl.arange(0, PR)[None, :]  # [BT, PR]
    m_r = (tl.arange(0, PR)[None, :] < ROWS) & (o_r < K)
    o_c = i_q[:, None] * COLS + tl.arange(0, PC)[None, :]  # [BT, PC]
    m_c = (tl.arange(0, PC)[None, :] < COLS) & (o_c < C)
    o_w = o_r[:, :, None] * s_k + o_c[:, None, :] * s_c
    o_w += i_t[:, None, None] * tl.load(p_row + 10).to(tl.int32)
    n = tl.sum(m_r.to(tl.int32), 1) * tl.sum(m_c.to(tl.int32), 1)  # [BT]
    o_n = (i_r * Q + i_q) * T + i_t  # where the norm stands: [R, Q, T]
    m_g = (i_r * ROWS < K) & (n > 0)
    return o_w, m_r[:, :, None] & m_c[:, None, :], tl.maximum(n, 1).to(tl.float32), o_n, m_g


@triton.jit
def group_threshold_fwd_kernel(
    p_table,  # [n, 11] int64: weights, values, norms, none
    p_owners,  # [N] int64
    p_firsts,  # [N] int64
    p_alpha,  # [] float32
    ROWS: tl.constexpr,
    COLS,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
    PR: tl.constexpr,
    PC: tl.constexpr,
):
    """S = W_g · max(0, 1 − α √n / ‖W_g‖), and ‖W_g‖."""
    i_b = tl.program_id(0).to(tl.int64)
    p_row = p_table + tl.load(p_owners + i_b) * 11
    o_w, m_w, n, o_n, m_g = _places(
        p_row, tl.load(p_firsts + i_b).to(tl.int32), ROWS, COLS, BT, PR, PC
    )
    p_w = tl.load(p_row).to(tl.pointer_type(DTYPE))
    p_s = tl.load(p_row + 1).to(tl.pointer_type(DTYPE))
    p_n = tl.load(p_row + 2).to(tl.pointer_type(tl.float32))
    b_alpha = tl.load(p_alpha)
    b_w = tl.load(p_w + o_w, mask=m_w, other=0.0).to(tl.float32)  # [BT, PR, PC]
    b_norm = tl.sqrt_rn(tl.sum(tl.sum(b_w * b_w, 2), 1))  # [BT]
    b_root = tl.sqrt_rn(n)
    m_dead = tl.div_rn(b_norm, b_root) <= b_alpha
    b_scale = 1.0 - tl.div_rn(b_alpha * b_root, tl.where(m_dead, 1.0, b_norm))
    b_s = tl.where(m_dead[:, None, None], 0.0, b_w * b_scale[:, None, None])
    tl.store(p_s + o_w, b_s.to(DTYPE), mask=m_w)
    tl.store(p_n + o_n, b_norm, mask=m_g)


@triton.jit
def group_threshold_bwd_kernel(
    p_table,  # [n, 11] int64: weights, gradients, norms, gradients of the weights
    p_owners,
    p_firsts,
    p_alpha,
    p_partials,  # [N] float32
    ROWS: tl.constexpr,
    COLS,
    DTYPE: tl.constexpr,
    BT: tl.constexpr,
    PR: tl.constexpr,
    PC: tl.constexpr,
):
    """gw = B · [(1 − t) g + t û (û·g)], and Σ B √n (û·g) over the program's groups."""
    i_b = tl.program_id(0).to(tl.int64)
    p_row = p_table + tl.load(p_owners + i_b) * 11
    o_w, m_w, n, o_n, m_g = _places(
        p_row, tl.load(p_firsts + i_b).to(tl.int32), ROWS, COLS, BT, PR, PC
    )
    p_w = tl.load(p_row).to(tl.pointer_type(DTYPE))
    p_g = tl.load(p_row + 1).to(tl.pointer_type(DTYPE))
    p_n = tl.load(p_row + 2).to(tl.pointer_type(tl.float32))
    p_gw = tl.load(p_row + 3).to(tl.pointer_type(DTYPE))
    b_alpha = tl.load(p_alpha)
    b_norm = tl.load(p_n + o_n, mask=m_g, other=0.0)  # [BT]
    b_root = tl.sqrt_rn(n)
    m_dead = (tl.div_rn(b_norm, b_root) <= b_alpha) | (m_g == 0)
    b_safe = tl.where(m_dead, 1.0, b_norm)
    b_t = tl.div_rn(b_alpha * b_root, b_safe)
    b_w = tl.load(p_w + o_w, mask=m_w, other=0.0).to(tl.float32)  # [BT, PR, PC]
    b_g = tl.load(p_g + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_along = tl.div_rn(tl.sum(tl.sum(b_w * b_g, 2), 1), b_safe)  # û · g
    b_towards = tl.div_rn(b_t * b_along, b_safe)[:, None, None]
    b_gw = (1.0 - b_t)[:, None, None] * b_g + b_towards * b_w
    b_gw = tl.where(m_dead[:, None, None], 0.0, b_gw)
    tl.store(p_gw + o_w, b_gw.to(DTYPE), mask=m_w)
    tl.store(p_partials + i_b, tl.sum(tl.where(m_dead, 0.0, b_root * b_along), 0))


def group_threshold_fwd(
    weights: Sequence[Tensor],
    alpha: Tensor,
    values: Sequence[Tensor],
    norms: Sequence[Tensor],
    tile: tuple[int, int],
) -> None:
    """Fill values and norms.

    weights, values: n dense tensors [K, C] or [K, C, kh, kw] of one storage type, laid out alike
    alpha: [] float32   norms: n tensors [R, Q, T] float32   tile: rows, columns; 0 for whole rows
    """
    _launch(group_threshold_fwd_kernel, (weights, values, norms, norms), alpha, tile, None)


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
    return _launch(group_threshold_bwd_kernel, tensors, alpha, tile, alpha)


def _launch(
    kernel: object,
    tensors: Sequence[Sequence[Tensor]],
    alpha: Tensor,
    tile: tuple[int, int],
    partials: Tensor | None,
) -> Tensor:
    """One launch for each width of group; whole rows differ in theirs."""
    sums = []
    for columns, members in _by_width(tensors[0], tile).items():
        rows = [_row([group[i] for group in tensors], columns, tile[1] == 0) for i in members]
        shape = launch_shape(tile[0], columns)
        counts = tuple(-(-row[4] // tile[0]) * row[6] * row[7] for row in rows)
        owners, firsts = program_table(counts, shape["BT"], alpha.device)
        table = device_table(tuple(rows), alpha.device)
        given = [table, owners, firsts, alpha]
        if partials is not None:
            sums.append(torch.empty(len(owners), dtype=torch.float32, device=alpha.device))
            given.append(sums[-1])
        kernel[(len(owners),)](
            *given,
            ROWS=tile[0],
            COLS=columns,
            DTYPE=TYPES[tensors[0][members[0]].dtype],
            **shape,
        )
    return torch.cat(sums) if sums else alpha.new_zeros(0)


def launch_shape(rows: int, columns: int) -> dict[str, int]:
    """Groups of a program, their sides rounded up to powers of 2, and warps."""
    PR, PC = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    # Few small groups at a time: each has offsets and sizes of its own in registers.
    BT = min(64, max(1, PROGRAM // (PR * PC)))
    return {"BT": BT, "PR": PR, "PC": PC, "num_warps": min(32, max(4, PR * PC * BT // 512))}


def _by_width(weights: Sequence[Tensor], tile: tuple[int, int]) -> dict[int, list[int]]:
    """Columns of a group → the tensors that have them; empty tensors are left out."""
    found: dict[int, list[int]] = {}
    for i, weight in enumerate(weights):
        if weight.numel() > 0:
            columns = tile[1] or weight.numel() // weight.shape[0]
            found.setdefault(columns, []).append(i)
    return found


def _row(tensors: Sequence[Tensor], columns: int, whole: bool) -> tuple[int, ...]:
    """A tensor's row of the table. Whole rows of any dense layout hold the same weights."""
    weight = tensors[0]
    K, C = weight.shape[:2]
    T = weight.numel() // (K * C)
    strides = [weight.stride(0), weight.stride(1), 1]
    if weight.dim() == 4:
        strides[2] = weight.stride(3) if weight.shape[3] > 1 else weight.stride(2)
    if whole:
        # A dense tensor whose rows are outermost has each row in one piece.
        C, T, strides = C * T, 1, [C * T, 1, 0]
    return (*(t.data_ptr() for t in tensors), K, C, T, -(-C // columns), *strides)


@lru_cache(maxsize=256)  # a model has few components, and their shapes do not change
def program_table(groups: tuple[int, ...], BT: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Owner and first group of every program, [N] int64 each on the device."""
    programs = torch.tensor([-(-count // BT) for count in groups])
    owners = torch.repeat_interleave(torch.arange(len(groups)), programs)
    before = torch.cumsum(programs, 0) - programs
    firsts = (torch.arange(len(owners)) - before[owners]) * BT
    return owners.to(device), firsts.to(device)
