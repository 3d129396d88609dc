"""Several convolutions of equal shapes in one launch: the branches of all heads.

Twelve branches of a DeepLab model are three launches instead of thirty-six: each by itself leaves
most of a GPU idle at small batches. Inputs, weights, biases and dilations may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsemtl.ops.block_pattern import BlockPattern
from sparsemtl.ops.sparse_conv2d_backends import ACTIVATIONS
from sparsemtl.ops.sparse_conv2d_pixels import pixel_order
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.ops.sparse_conv2d_tiles import Tile, default_tile, precision
from sparsemtl.ops.sparse_conv2d_triton import channels_of, empty_nhwc, nhwc

ALIGNMENT = 16  # bytes; what the kernel is compiled for
Rows = tuple[tuple[int, ...], ...]


class LateTable:
    """The table of one launch in a CUDA graph, whose addresses are known only while capturing.

    Nothing may be copied to the device then: the launch is given memory that was there before, and
    `write` fills it once the capture has ended. Outside of captures it is filled at once.
    """

    def __init__(self) -> None:
        self._rows: Rows = ()
        self._table: Tensor | None = None

    def __call__(self, rows: Rows, device: torch.device) -> Tensor:
        if self._table is None:
            self._table = torch.zeros(len(rows), len(rows[0]), dtype=torch.int64, device=device)
        self._rows = rows
        if not _capturing(device):
            self.write()
        return self._table

    def write(self) -> None:
        """Write the rows of the last launch."""
        if self._table is not None:
            self._table.copy_(torch.tensor(self._rows, dtype=torch.int64))


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def conv_branches(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    blocks: Sequence[BlockPattern],
    geometries: Sequence[Geometry],
    biases: Sequence[Tensor] | None = None,
    residuals: Sequence[Tensor] | None = None,
    activation: str | None = None,
    tile: Tile | None = None,
    table: Callable[[Rows, torch.device], Tensor] | None = None,
) -> list[Tensor]:
    """act(conv2d(x, weight) + bias + residual) of every branch.

    xs:         n tensors [B, C, H, W] of one shape, type and device; the same one may repeat
    weights:    n tensors [K, C / groups, kh, kw] of one shape, of x's type
    geometries: n, alike but for dilation and padding; outputs must have one size
    biases, residuals: n tensors [K], n like the outputs; or None
    table:      brings rows of addresses to the device; by default through pinned memory
    returns:    n tensors [B, K, OH, OW], channels_last
    raises:     ValueError where the branches differ otherwise, or memory is not aligned
    """
    from sparsemtl.kernels import device_table
    from sparsemtl.kernels.sparse_conv2d import Lists, Tiling, sparse_conv2d_grouped

    _check(xs, weights, blocks, geometries, biases, residuals)
    x, weight, g = xs[0], weights[0], geometries[0]
    size = (x.shape[2], x.shape[3])
    shape = (x.shape[0], weight.shape[0], *g.output_size(*size))
    tile = tile or default_tile(weight, blocks[0], g)
    sources, filters = [nhwc(t) for t in xs], [nhwc(t) for t in weights]
    ys = [empty_nhwc(x, shape) for _ in xs]
    added = ys if residuals is None else [nhwc(t) for t in residuals]
    shifts = ys if biases is None else [t.detach().contiguous() for t in biases]
    orders = [pixel_order(g, shape[0], size, tile.pixels, False, x.device) for g in geometries]
    lists = [
        Lists(*b.lists(order, tile.dest, tile.source, False))
        for b, order in zip(blocks, orders, strict=True)
    ]
    rows = []
    for i, order in enumerate(orders):
        tensors = [sources[i], filters[i], shifts[i], added[i], ys[i]]
        tensors += [order.bases, order.dests, order.live, order.classes, *lists[i]]
        rows.append((*(t.data_ptr() for t in tensors), *geometries[i].dilation, len(order.classes)))
    _check_aligned(rows)
    flags = {
        "BIAS": biases is not None,
        "RESIDUAL": residuals is not None,
        "ACTIVATION": ACTIVATIONS[activation],
    }
    sparse_conv2d_grouped(
        (table or device_table)(tuple(rows), x.device),
        max(len(order.classes) for order in orders),
        x.dtype,
        lists[0],
        channels_of(weight, g, False),
        g.kernel[1],
        orders[0].steps,
        Tiling(tile.pixels, tile.dest, tile.source, tile.warps, tile.stages),
        flags,
        precision(),
    )
    return ys


def _check(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    blocks: Sequence[BlockPattern],
    geometries: Sequence[Geometry],
    biases: Sequence[Tensor] | None,
    residuals: Sequence[Tensor] | None,
) -> None:
    who, count = "conv_branches: Expected", len(xs)
    given = {"weights": weights, "blocks": blocks, "geometries": geometries}
    given |= {n: v for n, v in (("biases", biases), ("residuals", residuals)) if v is not None}
    if count == 0:
        raise ValueError(f"{who} at least one branch, got none")
    for name, values in given.items():
        if len(values) != count:
            raise ValueError(f"{who} {count} {name}, as many as inputs, got {len(values)}")
    for name, tensors in (("xs", xs), ("weights", weights)):
        for t in tensors:
            if t.shape != tensors[0].shape or (t.dtype, t.device) != (xs[0].dtype, xs[0].device):
                raise ValueError(
                    f"{who} {name} of shape {list(tensors[0].shape)}, {xs[0].dtype} on "
                    f"{xs[0].device}, got {list(t.shape)}, {t.dtype} on {t.device}"
                )
    size = (xs[0].shape[2], xs[0].shape[3])
    first = geometries[0]
    for g in geometries:
        same = (g.stride, g.kernel, g.groups) == (first.stride, first.kernel, first.groups)
        if not same or g.output_size(*size) != first.output_size(*size):
            raise ValueError(
                f"{who} branches that differ in dilation and padding only, got {first} and {g}"
            )


def _check_aligned(rows: Sequence[tuple[int, ...]]) -> None:
    for row in rows:
        for name, address in zip(("x", "weight", "bias", "residual", "y"), row, strict=False):
            if name != "bias" and address % ALIGNMENT != 0:
                raise ValueError(
                    f"conv_branches: Expected {name} at a multiple of {ALIGNMENT} bytes, "
                    f"got address {address:#x}"
                )
