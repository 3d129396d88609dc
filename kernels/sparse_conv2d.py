"""Sparse convolution in Triton: an implicit GEMM over lists of live (tap, channel block) pairs.

Tensors are NHWC. One kernel serves three uses: with full lists it is the dense dilated
convolution that skips padding taps, with shorter ones the block-sparse convolution, and on
transposed lists, reading the output's gradient, the input gradient. Pixels come in an order in
which those that read the same taps are neighbours, so that a tile skips taps that read only
padding. sparsemtl/ops/sparse_conv2d_pixels.py makes the order, block_pattern.py the lists. The
weight gradient stands in sparse_conv2d_weight_grad.py.

S, N: source and destination channels of a group. M: pixels in tile order. Q, R: blocks of source
channels of a group, of destination channels of all groups. T: taps. An entry is tap · Q + block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .shared import TYPES


class Pixels(NamedTuple):
    """Tables of destination pixels in tile order; all on the device."""

    bases: Tensor  # [M] int32, the source pixel that a tap's offset is added to
    dests: Tensor  # [M] int32, the destination pixel; -1 where a tile is filled up
    live: Tensor  # [M] int64, a bit for each tap that reads the map
    classes: Tensor  # [tiles] int32, which lists a tile walks
    steps: tuple[int, int, int, int, int, int]  # dil_y, div_y, dil_x, div_x, pitch, sign


class Lists(NamedTuple):
    """Live entries of each class of tiles and each block of destination channels."""

    entries: Tensor  # [classes, R, T · Q] int32, the live ones first
    counts: Tensor  # [classes, R] int32
    rows: Tensor  # [R] int32, blocks in the order of falling work


class Channels(NamedTuple):
    """Channels of a group and how the weight lies in memory, in elements."""

    source: int  # S
    dest: int  # N
    groups: int
    stride_group: int
    stride_dest: int
    stride_source: int
    stride_tap: int


class Tiling(NamedTuple):
    """How a kernel is cut and launched."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    PANEL: int = 1  # of the weight gradient alone


class Epilogue(NamedTuple):
    """What is added to the sum before it is stored."""

    bias: Tensor | None = None  # [channels]
    residual: Tensor | None = None  # NHWC, like y
    activation: int = 0  # 0 none, 1 relu, 2 relu6


@triton.jit
def tap_offset(tap, dil_y, div_y, dil_x, div_x, pitch, sign, KW: tl.constexpr):
    """Source pixels between a destination pixel's base and what its tap reads."""
    return (tap // KW * dil_y // div_y) * pitch + (tap % KW * dil_x // div_x) * sign


@triton.jit
def _finish(b_y, p_bias, p_residual, o_y, o_n, m_y, m_n, BIAS, RESIDUAL, ACTIVATION):
    """act(y + bias + residual) in fp32; comparisons, not maximum, so that a NaN stays one."""
    if BIAS:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        b_y += tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    if ACTIVATION > 0:
        b_y = tl.where(b_y < 0.0, 0.0, b_y)
    if ACTIVATION > 1:
        b_y = tl.where(b_y > 6.0, 6.0, b_y)
    return b_y


@triton.jit
def sparse_conv2d_kernel(
    p_x,  # source, NHWC
    p_w,
    p_bias,
    p_residual,  # like y
    p_y,  # destination, NHWC
    p_bases,
    p_dests,
    p_live,
    p_classes,
    p_entries,
    p_counts,
    p_rows,
    p_partials,  # [SPLIT, M, channels] float32, with SPLIT > 1
    p_problems,  # [problems, 15] int64: addresses of the above, dilations, tiles; with GROUPED
    S,
    N,
    R,
    Q,
    capacity,  # T · Q
    groups,
    s_wg,
    s_wn,
    s_wk,
    s_wt,
    dil_y,
    div_y,
    dil_x,
    div_x,
    pitch,
    sign,
    KW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,  # S is a multiple of BK and N of BN
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,  # 0 none, 1 relu, 2 relu6
    PRECISION: tl.constexpr,
    GROUPED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """y[pixel, n] = act(Σ over live (tap, block) x[pixel + tap, block] · w[tap, block, n] + …)."""
    i_p = tl.program_id(0)
    i_split = tl.program_id(1)
    i_tile = i_p // R
    if GROUPED:
        p_row = p_problems + 15 * tl.program_id(2)
        # A problem of fewer tiles computes its last one again, to the same bits.
        i_tile = tl.minimum(i_tile, tl.load(p_row + 14).to(tl.int32) - 1)
        # A torch allocation starts at a multiple of 16 bytes; the launcher refuses what does not.
        p_x = tl.multiple_of(tl.load(p_row).to(tl.pointer_type(DTYPE)), 16)
        p_w = tl.multiple_of(tl.load(p_row + 1).to(tl.pointer_type(DTYPE)), 16)
        p_bias = tl.load(p_row + 2).to(tl.pointer_type(DTYPE))
        p_residual = tl.multiple_of(tl.load(p_row + 3).to(tl.pointer_type(DTYPE)), 16)
        p_y = tl.multiple_of(tl.load(p_row + 4).to(tl.pointer_type(DTYPE)), 16)
        p_bases = tl.load(p_row + 5).to(tl.pointer_type(tl.int32))
        p_dests = tl.load(p_row + 6).to(tl.pointer_type(tl.int32))
        p_live = tl.load(p_row + 7).to(tl.pointer_type(tl.int64))
        p_classes = tl.load(p_row + 8).to(tl.pointer_type(tl.int32))
        p_entries = tl.load(p_row + 9).to(tl.pointer_type(tl.int32))
        p_counts = tl.load(p_row + 10).to(tl.pointer_type(tl.int32))
        p_rows = tl.load(p_row + 11).to(tl.pointer_type(tl.int32))
        dil_y = tl.load(p_row + 12).to(tl.int32)
        dil_x = tl.load(p_row + 13).to(tl.int32)
    i_r = tl.load(p_rows + i_p % R)
    i_group = i_r // (R // groups)
    o_m = i_tile * BM + tl.arange(0, BM)  # [BM]
    o_k = tl.arange(0, BK)  # [BK]
    o_n = (i_r - i_group * (R // groups)) * BN + tl.arange(0, BN)  # [BN], within the group
    m_n = o_n < N
    b_base = tl.load(p_bases + o_m)  # [BM]
    b_live = tl.load(p_live + o_m)  # [BM]
    i_list = tl.load(p_classes + i_tile) * R + i_r
    n_entries = tl.load(p_counts + i_list)
    p_list = p_entries + i_list.to(tl.int64) * capacity
    first = n_entries * i_split // SPLIT
    last = n_entries * (i_split + 1) // SPLIT

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    p_wn = p_w + i_group * s_wg + o_n[None, :] * s_wn  # [1, BN]
    channels = S * groups
    for i in range(first, last):
        entry = tl.load(p_list + i)
        tap = entry // Q
        o_s = (entry % Q) * BK + o_k  # [BK], within the group
        offset = tap_offset(tap, dil_y, div_y, dil_x, div_x, pitch, sign, KW)
        p_a = (
            p_x + (b_base + offset).to(tl.int64)[:, None] * channels + (i_group * S + o_s)[None, :]
        )
        m_a = ((b_live >> tap) & 1).to(tl.int1)[:, None]
        p_b = p_wn + tap * s_wt + o_s[:, None] * s_wk
        if WHOLE:
            b_a = tl.load(p_a, mask=m_a, other=0.0)  # [BM, BK]
            b_b = tl.load(p_b)  # [BK, BN]
        else:
            b_a = tl.load(p_a, mask=m_a & (o_s < S)[None, :], other=0.0)
            b_b = tl.load(p_b, mask=(o_s < S)[:, None] & m_n[None, :], other=0.0)
        acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)

    b_dest = tl.load(p_dests + o_m)  # [BM]
    o_n = i_group * N + o_n
    o_y = b_dest.to(tl.int64)[:, None] * (N * groups) + o_n[None, :]  # [BM, BN]
    m_y = (b_dest >= 0)[:, None] & m_n[None, :]
    if SPLIT > 1:
        total = tl.num_programs(0).to(tl.int64) // R * BM * (N * groups)
        o_part = o_m.to(tl.int64)[:, None] * (N * groups) + o_n[None, :]
        tl.store(p_partials + i_split * total + o_part, acc, mask=m_y)
    else:
        b_y = _finish(acc, p_bias, p_residual, o_y, o_n, m_y, m_n, BIAS, RESIDUAL, ACTIVATION)
        tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def sparse_conv2d_sum_kernel(
    p_partials,  # [SPLIT, M, N] float32
    p_bias,
    p_residual,
    p_y,  # NHWC
    p_dests,
    M,
    N,
    total,  # M · N
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """y = act(Σ partials + bias + residual), always in the same order."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    m_n = o_n < N
    b_dest = tl.load(p_dests + o_m, mask=o_m < M, other=-1)  # [BM]
    m_y = (b_dest >= 0)[:, None] & m_n[None, :]
    o_part = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for i in tl.static_range(SPLIT):
        o_split = tl.full((), i, tl.int64) * total
        acc += tl.load(p_partials + o_split + o_part, mask=m_y, other=0.0)
    o_y = b_dest.to(tl.int64)[:, None] * N + o_n[None, :]
    b_y = _finish(acc, p_bias, p_residual, o_y, o_n, m_y, m_n, BIAS, RESIDUAL, ACTIVATION)
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    pixels: Pixels,
    lists: Lists,
    channels: Channels,
    kernel_width: int,
    tiling: Tiling,
    epilogue: Epilogue,
    precision: str,
    partials: Tensor | None = None,
) -> None:
    """Fill y.   x, y: NHWC memory   partials: [split, M, channels of y] float32, or None"""
    split = 1 if partials is None else partials.shape[0]
    tiles, R = len(pixels.classes), len(lists.rows)
    bias, residual, activation = epilogue
    flags = {
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "ACTIVATION": activation,
    }
    now = flags if split == 1 else {"BIAS": False, "RESIDUAL": False, "ACTIVATION": 0}
    bias, residual = y if bias is None else bias, y if residual is None else residual
    launch(
        sparse_conv2d_kernel,
        (tiles * R, split),
        *(x, weight, bias, residual, y),
        *(pixels.bases, pixels.dests, pixels.live, pixels.classes, *lists),
        *(y if partials is None else partials, pixels.dests),
        *_sizes(channels, lists, tiling),
        *pixels.steps,
        **_options(channels, kernel_width, tiling, precision, split),
        **now,
        GROUPED=False,
        DTYPE=TYPES[x.dtype],
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if partials is not None:
        M, N = tiles * tiling.BM, channels.dest * channels.groups
        BM, BN = 32, min(128, triton.next_power_of_2(N))
        launch(
            sparse_conv2d_sum_kernel,
            (triton.cdiv(M, BM), triton.cdiv(N, BN)),
            *(partials, bias, residual, y, pixels.dests, M, N, M * N),
            BM=BM,
            BN=BN,
            SPLIT=split,
            **flags,
            num_warps=4,
        )


def sparse_conv2d_grouped(
    problems: Tensor,
    tiles: int,
    dtype: torch.dtype,
    lists: Lists,
    channels: Channels,
    kernel_width: int,
    steps: tuple[int, int, int, int, int, int],
    tiling: Tiling,
    flags: dict[str, object],
    precision: str,
) -> None:
    """Several convolutions of equal shapes in one launch; all but the dilations must agree.

    problems: [problems, 15] int64 on the device, see the kernel   tiles: the most that one has
    lists, steps: those of any one, for the sizes that all share
    flags: BIAS, RESIDUAL, ACTIVATION
    """
    some = lists.rows  # stands where the table of problems is read instead
    launch(
        sparse_conv2d_kernel,
        (tiles * len(lists.rows), 1, len(problems)),
        *[some] * 13,
        problems,
        *_sizes(channels, lists, tiling),
        *steps,
        **_options(channels, kernel_width, tiling, precision, 1),
        **flags,
        GROUPED=True,
        DTYPE=TYPES[dtype],
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )


def _sizes(channels: Channels, lists: Lists, tiling: Tiling) -> Sequence[int]:
    R, capacity = len(lists.rows), lists.entries.shape[2]
    Q = triton.cdiv(channels.source, tiling.BK)
    return (channels.source, channels.dest, R, Q, capacity, *channels[2:])


def _options(
    channels: Channels, kernel_width: int, tiling: Tiling, precision: str, split: int
) -> dict[str, object]:
    whole = channels.source % tiling.BK == 0 and channels.dest % tiling.BN == 0
    return {
        "KW": kernel_width,
        "BM": tiling.BM,
        "BN": tiling.BN,
        "BK": tiling.BK,
        "SPLIT": split,
        "WHOLE": whole,
        "PRECISION": precision,
    }
