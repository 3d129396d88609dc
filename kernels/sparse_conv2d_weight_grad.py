"""The weight gradient of a sparse convolution in Triton, on live blocks alone.

A program owns a panel, a few live entries of one row of blocks, which share each load of the
output's gradient, and walks the tiles of pixels that some tap of theirs reads. Its epilogue may
carry the gradient on through the threshold: of single weights, S = sign(W) · max(|W| − α, 0), or of
groups that are its blocks, S = W_g · max(0, 1 − α √n / ‖W_g‖).

Letters as in sparse_conv2d.py.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .sparse_conv2d import Channels, Pixels, Tiling, tap_offset

NONE, ELEMENTS, GROUPS = 0, 1, 2  # the threshold that the epilogue goes through


class Panels(NamedTuple):
    """Live entries of each row by the panel, and the tiles of pixels that they read."""

    entries: Tensor  # [R, T · Q] int32, the live ones first
    counts: Tensor  # [R] int32
    tile_lists: Tensor  # [R, panels, tiles] int32
    tile_counts: Tensor  # [R, panels] int32


class Threshold(NamedTuple):
    """What the gradient passes on its way to W and α."""

    kind: int  # ELEMENTS or GROUPS
    master: Tensor  # W in float32, laid out like the weight's gradient
    alpha: Tensor  # [] float32
    shares: Tensor  # [R, panels] float32, to be filled at the panels that hold something


@triton.jit
def _panel(p_entries, i_r, i_panel, n_live, capacity, S, Q, BK: tl.constexpr, PANEL: tl.constexpr):
    """Taps, source channels within the group and masks of a panel's columns: [PANEL · BK]."""
    o_c = tl.arange(0, PANEL * BK)
    i_e = i_panel * PANEL + o_c // BK
    b_entry = tl.load(p_entries + i_r.to(tl.int64) * capacity + i_e, mask=i_e < n_live, other=0)
    # Each entry stands for BK neighbouring columns: without this hint loads are not wide.
    b_entry = tl.max_constancy(b_entry, BK)
    o_s = (b_entry % Q) * BK + o_c % BK
    return b_entry // Q, o_s, (i_e < n_live) & (o_s < S)


@triton.jit
def _through_groups(
    acc, b_w, m_w, b_alpha, BN: tl.constexpr, BK: tl.constexpr, PANEL: tl.constexpr
):
    """(1 − t) g + t û (û·g) of each block of a panel, and Σ √n (û·g); dead blocks give zero."""
    g = tl.reshape(acc, (BN, PANEL, BK))
    w = tl.reshape(b_w, (BN, PANEL, BK))
    n = tl.sum(tl.sum(tl.reshape(m_w.to(tl.float32), (BN, PANEL, BK)), 2), 0)  # [PANEL]
    b_root = tl.sqrt_rn(tl.maximum(n, 1.0))
    b_norm = tl.sqrt_rn(tl.sum(tl.sum(w * w, 2), 0))
    # Lists hold what the forward pass found alive. Its norm was summed in another order, so what is
    # dead by a rounding here is taken as alive; a list that holds more than is alive may differ by
    # as much.
    m_dead = (tl.div_rn(b_norm, b_root) <= b_alpha * 0.999999) | (n == 0.0)
    b_safe = tl.where(m_dead, 1.0, b_norm)
    b_t = tl.div_rn(b_alpha * b_root, b_safe)
    b_t = tl.where(b_t > 1.0, 1.0, b_t)
    b_along = tl.div_rn(tl.sum(tl.sum(w * g, 2), 0), b_safe)  # û · g
    b_towards = tl.div_rn(b_t * b_along, b_safe)[None, :, None]
    b_gw = (1.0 - b_t)[None, :, None] * g + b_towards * w
    b_gw = tl.where(m_dead[None, :, None], 0.0, b_gw)
    share = tl.sum(tl.where(m_dead, 0.0, b_root * b_along), 0)
    return tl.reshape(b_gw, (BN, PANEL * BK)), share


@triton.jit
def _store_gradient(
    acc,  # [BN, PANEL · BK]
    p_gw,
    p_master,
    p_alpha,
    p_share,
    o_w,
    m_w,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PANEL: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """Store the weight's gradient; through a threshold that of W, and α's share."""
    if THRESHOLD > 0:
        b_w = tl.load(p_master + o_w, mask=m_w, other=0.0)
        b_alpha = tl.load(p_alpha)
        if THRESHOLD == 1:
            acc = tl.where(tl.abs(b_w) <= b_alpha, 0.0, acc)
            b_signed = tl.where(b_w < 0, -acc, tl.where(b_w > 0, acc, 0.0))
            share = tl.sum(tl.sum(tl.where(m_w, b_signed, 0.0), 1), 0)
        else:
            acc = tl.where(m_w, acc, 0.0)
            acc, share = _through_groups(acc, b_w, m_w, b_alpha, BN, BK, PANEL)
        tl.store(p_share, share)
    tl.store(p_gw + o_w, acc.to(p_gw.dtype.element_ty), mask=m_w)


@triton.jit
def sparse_conv2d_weight_grad_kernel(
    p_x,  # NHWC
    p_gy,  # NHWC
    p_gw,  # laid out as the strides say
    p_master,  # W in float32, laid out like gw; with THRESHOLD
    p_alpha,  # [] float32
    p_shares,  # [R, panels] float32
    p_bases,
    p_dests,
    p_live,
    p_entries,  # [R, T · Q]
    p_counts,  # [R]
    p_tile_lists,  # [R, panels, tiles] int32, tiles of pixels that some tap of a panel reads
    p_tile_counts,  # [R, panels] int32
    p_partials,  # [SPLIT, R, panels, BN, PANEL · BK] float32
    S,
    N,
    R,
    Q,
    capacity,
    panels,
    tiles,
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
    PANEL: tl.constexpr,  # entries of a row that share the load of gy
    SPLIT: tl.constexpr,
    THRESHOLD: tl.constexpr,  # 0 none, 1 single weights, 2 groups of BN by BK
    PRECISION: tl.constexpr,
):
    """gw[n, tap, s] = Σ over pixels gy[pixel, n] · x[pixel + tap, s], on live blocks alone."""
    i_p = tl.program_id(0)
    i_split = tl.program_id(1)
    i_r = i_p // panels
    i_panel = i_p % panels
    n_live = tl.load(p_counts + i_r)
    if i_panel * PANEL < n_live:
        i_group = i_r // (R // groups)
        o_n = (i_r - i_group * (R // groups)) * BN + tl.arange(0, BN)  # [BN], within the group
        b_tap, o_s, m_c = _panel(p_entries, i_r, i_panel, n_live, capacity, S, Q, BK, PANEL)
        b_offset = tap_offset(b_tap, dil_y, div_y, dil_x, div_x, pitch, sign, KW)
        o_m = tl.arange(0, BM)
        i_list = i_p.to(tl.int64)
        n_tiles = tl.load(p_tile_counts + i_list)
        acc = tl.zeros((BN, PANEL * BK), dtype=tl.float32)
        for i in range(n_tiles * i_split // SPLIT, n_tiles * (i_split + 1) // SPLIT):
            o_t = tl.load(p_tile_lists + i_list * tiles + i) * BM + o_m  # [BM]
            b_dest = tl.load(p_dests + o_t)
            b_base = tl.load(p_bases + o_t)
            b_live = tl.load(p_live + o_t)
            o_gy = b_dest.to(tl.int64)[:, None] * (N * groups) + (i_group * N + o_n)[None, :]
            m_gy = (b_dest >= 0)[:, None] & (o_n < N)[None, :]
            b_gy = tl.load(p_gy + o_gy, mask=m_gy, other=0.0)  # [BM, BN]
            o_x = (b_base[:, None] + b_offset[None, :]).to(tl.int64) * (S * groups)
            m_x = ((b_live[:, None] >> b_tap[None, :]) & 1).to(tl.int1) & m_c[None, :]
            b_x = tl.load(p_x + o_x + (i_group * S + o_s)[None, :], mask=m_x, other=0.0)
            acc = tl.dot(tl.trans(b_gy), b_x, acc, input_precision=PRECISION)
        m_w = (o_n < N)[:, None] & m_c[None, :]
        if SPLIT > 1:
            o_part = tl.arange(0, BN)[:, None] * (PANEL * BK) + tl.arange(0, PANEL * BK)[None, :]
            i_part = (i_split * R * panels + i_p).to(tl.int64) * (BN * PANEL * BK)
            tl.store(p_partials + i_part + o_part, acc)
        else:
            o_w = i_group * s_wg + o_n[:, None] * s_wn + (b_tap * s_wt + o_s * s_wk)[None, :]
            p_share = p_shares + i_p
            _store_gradient(
                acc, p_gw, p_master, p_alpha, p_share, o_w, m_w, BN, BK, PANEL, THRESHOLD
            )


@triton.jit
def sparse_conv2d_weight_grad_sum_kernel(
    p_partials,  # [SPLIT, R, panels, BN, PANEL · BK] float32
    p_gw,
    p_master,
    p_alpha,
    p_shares,
    p_entries,
    p_counts,
    S,
    N,
    R,
    Q,
    capacity,
    panels,
    groups,
    s_wg,
    s_wn,
    s_wk,
    s_wt,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PANEL: tl.constexpr,
    SPLIT: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """gw = Σ partials, always in the same order."""
    i_p = tl.program_id(0)
    i_r = i_p // panels
    i_panel = i_p % panels
    n_live = tl.load(p_counts + i_r)
    if i_panel * PANEL < n_live:
        i_group = i_r // (R // groups)
        o_n = (i_r - i_group * (R // groups)) * BN + tl.arange(0, BN)
        b_tap, o_s, m_c = _panel(p_entries, i_r, i_panel, n_live, capacity, S, Q, BK, PANEL)
        m_w = (o_n < N)[:, None] & m_c[None, :]
        o_part = tl.arange(0, BN)[:, None] * (PANEL * BK) + tl.arange(0, PANEL * BK)[None, :]
        acc = tl.zeros((BN, PANEL * BK), dtype=tl.float32)
        for i in tl.static_range(SPLIT):
            i_part = (i * R * panels + i_p).to(tl.int64) * (BN * PANEL * BK)
            acc += tl.load(p_partials + i_part + o_part)
        o_w = i_group * s_wg + o_n[:, None] * s_wn + (b_tap * s_wt + o_s * s_wk)[None, :]
        p_share = p_shares + i_p
        _store_gradient(acc, p_gw, p_master, p_alpha, p_share, o_w, m_w, BN, BK, PANEL, THRESHOLD)


def sparse_conv2d_weight_grad(
    x: Tensor,
    grad_y: Tensor,
    grad_weight: Tensor,
    pixels: Pixels,
    panels: Panels,
    channels: Channels,
    kernel_width: int,
    tiling: Tiling,
    precision: str,
    partials: Tensor | None = None,
    threshold: Threshold | None = None,
) -> None:
    """Fill the live blocks of grad_weight and nothing else.

    x, grad_y: NHWC memory   partials: [split, R, panels, BN, PANEL · BK] float32, or None
    threshold: whose gradient is wanted, that of W in place of that of S(W, α)
    """
    split = 1 if partials is None else partials.shape[0]
    R, count, tiles = panels.tile_lists.shape
    capacity = panels.entries.shape[1]
    Q = triton.cdiv(channels.source, tiling.BK)
    kind, *through = threshold or (NONE, grad_weight, grad_weight, grad_weight)
    shape = {"BN": tiling.BN, "BK": tiling.BK, "PANEL": tiling.PANEL, "SPLIT": split}
    shape["THRESHOLD"] = kind
    launch(
        sparse_conv2d_weight_grad_kernel,
        (R * count, split),
        *(x, grad_y, grad_weight, *through),
        *(pixels.bases, pixels.dests, pixels.live, *panels),
        grad_weight if partials is None else partials,
        *(channels.source, channels.dest, R, Q, capacity, count, tiles, *channels[2:]),
        *pixels.steps,
        KW=kernel_width,
        BM=tiling.BM,
        **shape,
        PRECISION=precision,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    if partials is not None:
        launch(
            sparse_conv2d_weight_grad_sum_kernel,
            (R * count,),
            *(partials, grad_weight, *through, panels.entries, panels.counts),
            *(channels.source, channels.dest, R, Q, capacity, count, *channels[2:]),
            **shape,
            num_warps=tiling.warps,
        )
