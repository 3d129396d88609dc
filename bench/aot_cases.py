"""Every way in which a Triton kernel is launched, for bench/aot.py: each tile and each switch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple

import torch

Case = tuple[str, object, list[object], dict[str, object]]
I32, I64, F32 = torch.int32, torch.int64, torch.float32
GROUPS = ((64, 128), (64, 64), (32, 32), (16, 16), (8, 1), (3, 5), (1, 512 * 9))


def cases() -> Iterator[Case]:
    """Name, kernel, argument types or values, options."""
    yield from elementwise()
    yield from group_thresholds()
    yield from convolutions()
    yield from weight_gradients()


def value_types() -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """Storage types of weights and of their values that are used together."""
    for dtype in (F32, torch.bfloat16, torch.float16):
        yield dtype, dtype
    yield F32, torch.bfloat16
    yield F32, torch.float16


def elementwise() -> Iterator[Case]:
    from sparsemtl.kernels import soft_threshold as st
    from sparsemtl.kernels import threshold_adam as ta
    from sparsemtl.kernels.shared import TYPES, group_shape
    from sparsemtl.ops.soft_threshold_backends import TRITON_BLOCK
    from sparsemtl.ops.threshold_adam_backends import LARGEST_GROUP

    tables: list[object] = [I64] * 4  # addresses, sizes, owners, starts
    for dtype, values in value_types():
        types = {"DTYPE": TYPES[dtype], "VALUES": TYPES[values]}
        options = {"BP": TRITON_BLOCK, "num_warps": 4, "ALIGNED": True}
        tail = f"{str(dtype)[6:]}-{str(values)[6:]}"
        arguments = [*tables, F32, I64, 12]
        kinds = [("plain", 0, 0, 1), ("narrow", 0, 0, 0), ("count", 1, 0, 1), ("mask", 1, 1, 1)]
        for kind, count, mask, wide in kinds:
            flags = {"COUNT": bool(count), "MASK": bool(mask), "ALIGNED": bool(wide)}
            name = f"soft_threshold_fwd/{tail}/{kind}"
            flags = {**options, **types, **flags}
            yield name, st.soft_threshold_fwd_kernel, arguments, flags
        name = f"soft_threshold_bwd/{tail}"
        yield name, st.soft_threshold_bwd_kernel, [*tables, F32, F32, 12], {**options, **types}
        for rows, columns in ((64, 64), (32, 32), (16, 16)):
            shape = group_shape(rows, columns)
            name = f"soft_threshold_tiles/{tail}/{rows}x{columns}"
            flags = {"ROWS": rows, "COLS": columns, **types, **shape}
            yield name, st.soft_threshold_tiles_kernel, [I64, I64, I64, F32], flags
        if dtype is not F32:
            continue
        arguments = [*tables, F32, I64, F32, I64, 12]
        kinds = [("adam", 0, 0, 1), ("threshold", 1, 0, 1), ("mask", 1, 1, 1), ("narrow", 1, 1, 0)]
        for kind, threshold, mask, wide in kinds:
            flags = {"THRESHOLD": bool(threshold), "MASK": bool(mask), "ALIGNED": bool(wide)}
            name = f"threshold_adam/{str(values)[6:]}/{kind}"
            flags = {**options, "DTYPE": TYPES[values], **flags}
            yield name, ta.threshold_adam_kernel, arguments, flags
        for rows, columns in GROUPS:
            shape = group_shape(rows, columns)
            if shape["PR"] * shape["PC"] > LARGEST_GROUP:
                continue
            name = f"threshold_adam_groups/{str(values)[6:]}/{rows}x{columns}"
            flags = {"ROWS": rows, "COLS": columns, "DTYPE": TYPES[values], **shape}
            given: list[object] = [I64, I64, I64, F32, F32, I64]
            yield name, ta.threshold_adam_groups_kernel, given, flags


def group_thresholds() -> Iterator[Case]:
    from sparsemtl.kernels import group_threshold as gt
    from sparsemtl.kernels.shared import TYPES, group_shape

    for dtype, values in value_types():
        for rows, columns in GROUPS:
            shape = group_shape(rows, columns)
            options = {"ROWS": rows, "DTYPE": TYPES[dtype], "VALUES": TYPES[values], **shape}
            name = f"{str(dtype)[6:]}-{str(values)[6:]}/{rows}x{columns}"
            given: list[object] = [I64, I64, I64, F32]
            forward, backward = gt.group_threshold_fwd_kernel, gt.group_threshold_bwd_kernel
            yield f"group_threshold_fwd/{name}", forward, [*given], {**options, "COLS": columns}
            yield (
                f"group_threshold_bwd/{name}",
                backward,
                [*given, F32],
                {**options, "COLS": columns},
            )


def precisions() -> Iterator[tuple[torch.dtype, str, str]]:
    """Storage type, products, and the name of the two."""
    yield torch.bfloat16, "ieee", "bfloat16"
    yield torch.float16, "ieee", "float16"
    yield F32, "tf32", "tf32"
    yield F32, "ieee", "float32"


# 3x3 at rate 6, 512 → 1024 channels, 41x41: what all sizes are specialised to. 500 → 1000 has
# channels that no tile divides.
def sizes(source: int, dest: int, tile) -> list[object]:
    blocks = (-(-dest // tile.dest), -(-source // tile.source))
    return [source, dest, *blocks, 9 * blocks[1], 1]


def strides(source: int, dest: int) -> list[object]:
    return [dest * source * 9, source * 9, 1, source]


def convolutions() -> Iterator[Case]:
    from sparsemtl.kernels import sparse_conv2d as kernels
    from sparsemtl.kernels.shared import TYPES
    from sparsemtl.ops.sparse_conv2d_tiles import RAGGED, tiles_of

    tables: list[object] = [I32, I32, I64, I32, I32, I32, I32, F32, I64]
    plain = {"SPLIT": 1, "WHOLE": True, "BIAS": True, "RESIDUAL": True, "ACTIVATION": 1}
    plain |= {"GROUPED": False}
    variants: dict[str, dict[str, object]] = {
        "bare": {"BIAS": False, "RESIDUAL": False, "ACTIVATION": 0},
        "relu6": {"ACTIVATION": 2},
        "ragged": {"WHOLE": False},
        "split": {"SPLIT": 4, "BIAS": False, "RESIDUAL": False, "ACTIVATION": 0},
        "grouped": {"GROUPED": True},
    }
    for dtype, products, name in precisions():
        tiles = tiles_of(dtype, products=products)
        ragged = tiles[0] if dtype is F32 else RAGGED
        jobs = [(tile, "whole", {}) for tile in tiles]
        jobs += [(tile, "input-grad", variants["bare"]) for tile in tiles]
        jobs += [(ragged if k == "ragged" else tiles[0], k, v) for k, v in variants.items()]
        for tile, kind, change in jobs:
            options = {"KW": 3, "BM": tile.pixels, "BN": tile.dest, "BK": tile.source}
            options |= {"PRECISION": products, "DTYPE": TYPES[dtype]}
            options |= {"num_warps": tile.warps, "num_stages": tile.stages}
            source, dest = (500, 1000) if kind == "ragged" else (512, 1024)
            numbers = [*sizes(source, dest, tile), *strides(source, dest), 6, 1, 6, 1, 41, 1]
            if kind == "input-grad":
                numbers = [*sizes(dest, source, tile), dest * source * 9, 1, source * 9, source]
                numbers += [6, 1, 6, 1, -41, -1]
            yield (
                f"sparse_conv2d/{name}/{'x'.join(map(str, astuple(tile)[:5]))}/{kind}",
                kernels.sparse_conv2d_kernel,
                [*[dtype] * 5, *tables, *numbers],
                {**options, **plain, **change},
            )
        options = {"BM": 32, "BN": 128, "BIAS": True, "RESIDUAL": True, "ACTIVATION": 1}
        arguments = [F32, dtype, dtype, dtype, I32, 1792, 1024, 1792 * 1024]
        for splits in (2, 4, 8):
            yield (
                f"sparse_conv2d_sum/{name}/{splits}",
                kernels.sparse_conv2d_sum_kernel,
                arguments,
                {**options, "SPLIT": splits, "num_warps": 4},
            )


def weight_gradients() -> Iterator[Case]:
    from sparsemtl.kernels import sparse_conv2d_weight_grad as kernels
    from sparsemtl.ops.sparse_conv2d_tiles import tiles_of

    tables: list[object] = [I32, I32, I64, I32, I32, I32, I32, F32]
    for dtype, products, name in precisions():
        for place, tile in enumerate(tiles_of(dtype, grad=True, products=products)):
            blocks = {"BN": tile.dest, "BK": tile.source, "PANEL": tile.panel}
            launch = {"num_warps": tile.warps, "num_stages": tile.stages}
            tile_name = f"{name}/{'x'.join(map(str, astuple(tile)))}"
            source, dest, r, q, capacity, groups = sizes(512, 1024, tile)
            panels = -(-capacity // tile.panel)
            kinds = {"plain": (1, 0), "elements": (1, 1), "groups": (1, 2)}
            if place == 0:
                kinds["split"] = (4, 0)
            for kind, (split, threshold) in kinds.items():
                numbers = [source, dest, r, q, capacity, panels, 420, groups]
                numbers += [*strides(512, 1024), 6, 1, 6, 1, 41, 1]
                flags = {"SPLIT": split, "THRESHOLD": threshold, "PRECISION": products}
                yield (
                    f"sparse_conv2d_weight_grad/{tile_name}/{kind}",
                    kernels.sparse_conv2d_weight_grad_kernel,
                    [dtype, dtype, F32 if threshold else dtype, F32, F32, F32, *tables, *numbers],
                    {"KW": 3, "BM": tile.pixels, **blocks, **flags, **launch},
                )
            sums: list[object] = [F32, dtype, F32, F32, F32, I32, I32]
            for split in (2, 4, 8) if place == 0 else ():
                kind = 2 if split == 4 else 1
                yield (
                    f"sparse_conv2d_weight_grad_sum/{tile_name}/{split}",
                    kernels.sparse_conv2d_weight_grad_sum_kernel,
                    [*sums, source, dest, r, q, capacity, panels, groups, *strides(512, 1024)],
                    {**blocks, "SPLIT": split, "THRESHOLD": kind, "num_warps": tile.warps},
                )
