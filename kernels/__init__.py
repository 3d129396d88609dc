"""Triton kernels, one file per op; imported by sparsemtl.ops alone."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_captured: dict[int, tuple[Tensor, Tensor]] = {}


def device_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Rows of integers, addresses mostly, as int64 on the device.

    They travel through pinned memory without waiting, so that a CUDA graph can hold the copy, and
    are kept for the next call: addresses repeat from step to step, as the allocator reuses memory.
    """
    found, pinned = _tables(rows, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[id(found)] = (found, pinned)  # a replay reads them whenever it comes
    return found


@lru_cache(maxsize=512)
def _tables(rows: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type != "cuda":
        return table, table
    pinned = table.pin_memory()
    return pinned.to(device, non_blocking=True), pinned
