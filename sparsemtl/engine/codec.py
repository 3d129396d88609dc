"""Weights in few bytes: values beside where they stand, whichever coding is smallest.

dense    values, all of them
bitmask  values of the nonzeros, and one bit per element (little end first): best above 1/8 density
gaps     values of the nonzeros, and one byte for each: the number of zeros before it, below 255;
         a byte 255 stands for 255 zeros without a nonzero behind them

Zeros are exact; a nonzero keeps its bits, or is rounded to bfloat16 where that was asked for (one
that rounds to zero stays a nonzero's place). No coding says more zeros than `MOST_GROWTH` allows,
so what a file makes of memory is bounded by its size.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

CODINGS = ("dense", "bitmask", "gaps")
MOST_GROWTH = 256  # decoded bytes for a coded one, beyond the first 64 KiB
_FREE_BYTES = 1 << 16
_SKIP = 255
_BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)


def encode(
    weight: Tensor, values_dtype: torch.dtype | None = None
) -> tuple[str, dict[str, Tensor]]:
    """Coding and its parts by name ("values", "index").

    weight:       float32 on the CPU, any shape; others are stored dense as they are
    values_dtype: bfloat16 to round the values
    """
    flat = weight.detach().contiguous().reshape(-1)
    if weight.dtype is not torch.float32 or weight.numel() == 0:
        return "dense", {"values": flat}
    places = np.flatnonzero(flat.numpy())
    values = flat[torch.from_numpy(places)].to(values_dtype or flat.dtype)
    candidates = {
        "dense": {"values": flat.to(values.dtype)},
        "bitmask": {"values": values, "index": _to_bits(places, flat.numel())},
        "gaps": {"values": values, "index": _to_gaps(places, flat.numel())},
    }
    sizes = {name: _bytes(parts) for name, parts in candidates.items()}
    if _too_much(weight.numel() * 4, sizes["gaps"]):
        del sizes["gaps"]
    best = min(sizes, key=lambda name: sizes[name])
    return best, candidates[best]


def check(coding: str, shape: tuple[int, ...], sizes: dict[str, tuple[torch.dtype, int]]) -> None:
    """raises: ValueError unless parts of these dtypes and lengths may decode to this shape

    Called before anything is read or allocated.
    """
    count = prod(shape)
    values = sizes["values"][1]
    index_dtype, index = sizes.get("index", (None, 0))
    coded = sum(dtype.itemsize * length for dtype, length in sizes.values())
    fits = {
        "dense": index_dtype is None and values == count,
        "bitmask": index_dtype is torch.uint8 and index == -(-count // 8),
        "gaps": index_dtype is torch.uint8 and values <= index <= values + count // _SKIP,
    }
    if not fits[coding] or values > count or _too_much(count * 4, coded):
        raise ValueError(f"engine: Expected {coding} parts of a weight {list(shape)}, got {sizes}")


def check_places(coding: str, shape: tuple[int, ...], parts: dict[str, Tensor]) -> None:
    """raises: ValueError unless the index of a checked coding fits the values and the shape

    As `decode` would find, without the memory of the weight.
    """
    count, values = prod(shape), len(parts["values"])
    index = parts["index"].numpy()
    if coding == "bitmask":
        places, beyond = int(_BITS_SET[index].sum()), count % 8
        if beyond and int(index[-1]) >> beyond:
            raise ValueError("engine: Expected no bits beyond the weight, got some")
    else:
        places = int(np.count_nonzero(index != _SKIP))
        reach = int(index.sum(dtype=np.int64)) + places
        if reach > count:
            raise ValueError(f"engine: Expected places below {count}, got {reach - 1}")
    if places != values:
        raise ValueError(
            f"engine: Expected {values} places of a weight {list(shape)}, got {places}"
        )


def decode(
    coding: str,
    shape: tuple[int, ...],
    parts: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of a checked coding.   dtype: what it was; rounded values are widened again

    raises: ValueError if the index does not fit the values or the shape
    """
    values = parts["values"]
    if coding == "dense":
        return values.to(dtype).reshape(shape)
    weight = torch.zeros(shape, dtype=torch.float32)
    read = _from_bits if coding == "bitmask" else _from_gaps
    places = read(parts["index"].numpy(), weight.numel())
    if len(places) != len(values):
        raise ValueError(
            f"engine: Expected {len(values)} places of a weight {list(shape)}, got {len(places)}"
        )
    weight.view(-1)[torch.from_numpy(places)] = values.float()
    return weight


def _to_bits(places: np.ndarray, count: int) -> Tensor:
    mask = np.zeros(count, dtype=bool)
    mask[places] = True
    return torch.from_numpy(np.packbits(mask, bitorder="little"))


def _from_bits(bits: np.ndarray, count: int) -> np.ndarray:
    mask = np.unpackbits(bits, bitorder="little").view(bool)
    if mask[count:].any():
        raise ValueError("engine: Expected no bits beyond the weight, got some")
    return np.flatnonzero(mask[:count])


def _to_gaps(places: np.ndarray, count: int) -> Tensor:
    zeros = np.diff(places, prepend=-1) - 1  # before each nonzero
    skips = zeros // _SKIP
    index = np.full(len(places) + int(skips.sum()), _SKIP, dtype=np.uint8)
    index[np.arange(len(places)) + np.cumsum(skips)] = zeros % _SKIP
    return torch.from_numpy(index)


def _from_gaps(index: np.ndarray, count: int) -> np.ndarray:
    steps = index.astype(np.int64)
    is_value = index != _SKIP
    steps += is_value
    places = np.cumsum(steps, out=steps)[is_value] - 1
    if len(places) and places[-1] >= count:
        raise ValueError(f"engine: Expected places below {count}, got {places[-1]}")
    return places


def _bytes(parts: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in parts.values())


def _too_much(decoded: int, coded: int) -> bool:
    return decoded > _FREE_BYTES + MOST_GROWTH * coded
