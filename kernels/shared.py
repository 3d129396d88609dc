"""What several kernels share: storage types, places of blocks and of groups, the shrinkage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
PROGRAM = 512  # weights of one program over groups, unless a group has more
ALIGNMENT = 16  # bytes of a wide access, and weights that every size must be a multiple of


# Blocks of BP neighbouring weights of many tensors, each block by one program.


@triton.jit
def block_place(p_owners, p_starts, p_sizes, BP: tl.constexpr, ALIGNED: tl.constexpr):
    """A program's block: its tensor, its first weight, offsets [BP], and the tensor's size."""
    i_b = tl.program_id(0).to(tl.int64)
    i_t = tl.load(p_owners + i_b)
    i_first = tl.multiple_of(tl.load(p_starts + i_b), 16)
    P = tl.load(p_sizes + i_t)
    if ALIGNED:  # of the size too: a mask that may end anywhere allows narrow accesses only
        P = tl.multiple_of(P, 16)
    return i_t, i_first, i_first + tl.arange(0, BP), P


@triton.jit
def tensor_at(p_address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to the tensor whose address is stored there."""
    p = tl.load(p_address).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def shrunk(b_w, b_alpha):
    """S(w, α), and where w is dead: |w| ≤ α, so that a NaN is alive and shows."""
    m_dead = tl.abs(b_w) <= b_alpha
    return tl.where(m_dead, 0.0, tl.where(b_w < 0, b_w + b_alpha, b_w - b_alpha)), m_dead


@triton.jit
def store_bits(p_mask, b_alive, i_first, P, BP: tl.constexpr):
    """A bit for each weight of a block, lowest first; the last byte is padded with zeros."""
    b_bits = tl.reshape(b_alive, (BP // 8, 8)) << tl.arange(0, 8)[None, :]
    o_m = i_first // 8 + tl.arange(0, BP // 8)  # [BP / 8]
    tl.store(p_mask + o_m, tl.sum(b_bits, axis=1).to(tl.uint8), mask=o_m * 8 < P)


@lru_cache(maxsize=256)  # a model has few components, and their sizes do not change
def block_table(
    sizes: tuple[int, ...], BP: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Owner and start of every block, [N] each, and the sizes, [n]; int64 on the device."""
    owners, starts = _cut(sizes, BP)
    return owners.to(device), starts.to(device), torch.tensor(sizes).to(device)


def aligned(*groups: Sequence[Tensor]) -> bool:
    """Whether accesses of 16 bytes are allowed: every address and every size fits them."""
    tensors = [t for group in groups for t in group if t.numel() > 0]
    return all(t.data_ptr() % ALIGNMENT == 0 for t in tensors) and all(
        t.numel() % ALIGNMENT == 0 for t in tensors if t.element_size() > 1
    )


# Groups of ROWS by COLS weights at one tap, BT neighbouring ones by one program.


@triton.jit
def group_places(
    p_row,  # of the table: addresses, then K, C, T, Q and three strides from LEAD on
    i_first,
    ROWS,
    COLS,
    LEAD: tl.constexpr,
    BT: tl.constexpr,
    PR: tl.constexpr,
    PC: tl.constexpr,
):
    """Offsets and masks [BT, PR, PC] of a program's groups; sizes, places and masks [BT]."""
    # A tensor holds fewer than 2^31 weights: offsets within it are 32 bits, which saves registers.
    K, C = tl.load(p_row + LEAD).to(tl.int32), tl.load(p_row + LEAD + 1).to(tl.int32)
    T, Q = tl.load(p_row + LEAD + 2).to(tl.int32), tl.load(p_row + LEAD + 3).to(tl.int32)
    s_k, s_c = tl.load(p_row + LEAD + 4).to(tl.int32), tl.load(p_row + LEAD + 5).to(tl.int32)
    o_g = i_first + tl.arange(0, BT)  # groups in the order r, t, q
    i_q, i_rt = o_g % Q, o_g // Q
    i_t, i_r = i_rt % T, i_rt // T
    o_r = i_r[:, None] * ROWS + tl.arange(0, PR)[None, :]  # [BT, PR]
    m_r = (tl.arange(0, PR)[None, :] < ROWS) & (o_r < K)
    o_c = i_q[:, None] * COLS + tl.arange(0, PC)[None, :]  # [BT, PC]
    m_c = (tl.arange(0, PC)[None, :] < COLS) & (o_c < C)
    o_w = o_r[:, :, None] * s_k + o_c[:, None, :] * s_c
    o_w += i_t[:, None, None] * tl.load(p_row + LEAD + 6).to(tl.int32)
    n = tl.sum(m_r.to(tl.int32), 1) * tl.sum(m_c.to(tl.int32), 1)  # [BT]
    o_n = (i_r * Q + i_q) * T + i_t  # where the group stands in [R, Q, T]
    m_g = (i_r * ROWS < K) & (n > 0)
    return o_w, m_r[:, :, None] & m_c[:, None, :], tl.maximum(n, 1).to(tl.float32), o_n, m_g


@triton.jit
def group_shrunk(b_w, n, b_alpha):
    """S(W_g, α) [BT, PR, PC], the norms and where a group is dead [BT]."""
    b_norm = tl.sqrt_rn(tl.sum(tl.sum(b_w * b_w, 2), 1))
    b_root = tl.sqrt_rn(n)
    m_dead = tl.div_rn(b_norm, b_root) <= b_alpha
    b_scale = 1.0 - tl.div_rn(b_alpha * b_root, tl.where(m_dead, 1.0, b_norm))
    return tl.where(m_dead[:, None, None], 0.0, b_w * b_scale[:, None, None]), b_norm, m_dead


def group_shape(rows: int, columns: int) -> dict[str, int]:
    """Groups of a program, their sides rounded up to powers of 2, and warps."""
    PR, PC = triton.next_power_of_2(rows), triton.next_power_of_2(columns)
    # Few small groups at a time: each has offsets and sizes of its own in registers.
    BT = min(64, max(1, PROGRAM // (PR * PC)))
    return {"BT": BT, "PR": PR, "PC": PC, "num_warps": min(32, max(4, PR * PC * BT // 512))}


def group_row(weight: Tensor, columns: int, whole: bool) -> tuple[int, ...]:
    """A tensor's K, C, T, Q and strides. Whole rows of any dense layout hold the same weights."""
    K, C = weight.shape[0], weight.shape[1] if weight.dim() > 1 else 1
    T = weight.numel() // (K * C)
    strides = [weight.stride(0), weight.stride(1) if weight.dim() > 1 else 1, 1]
    if weight.dim() == 4:
        strides[2] = weight.stride(3) if weight.shape[3] > 1 else weight.stride(2)
    if whole:
        # A dense tensor whose rows are outermost has each row in one piece.
        C, T, strides = C * T, 1, [C * T, 1, 0]
    return (K, C, T, -(-C // columns), *strides)


def by_width(weights: Sequence[Tensor], tile: tuple[int, int]) -> dict[int, list[int]]:
    """Columns of a group → the tensors that have them; empty tensors are left out."""
    found: dict[int, list[int]] = {}
    for i, weight in enumerate(weights):
        if weight.numel() > 0:
            columns = tile[1] or weight.numel() // weight.shape[0]
            found.setdefault(columns, []).append(i)
    return found


@lru_cache(maxsize=256)
def program_table(groups: tuple[int, ...], BT: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Owner and first group of every program, [N] int64 each on the device."""
    owners, firsts = _cut(groups, BT)
    return owners.to(device), firsts.to(device)


def _cut(counts: tuple[int, ...], size: int) -> tuple[Tensor, Tensor]:
    """Owner and start of every piece of `size`, of each count in turn."""
    pieces = torch.tensor([-(-count // size) for count in counts])
    owners = torch.repeat_interleave(torch.arange(len(counts)), pieces)
    before = torch.cumsum(pieces, 0) - pieces
    return owners, (torch.arange(len(owners)) - before[owners]) * size
