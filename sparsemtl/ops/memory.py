"""Outputs of native ops: large ones come from memory that earlier outputs have given back.

The system's allocator maps every tensor of 32 MiB or more anew, and touching fresh pages costs
several times what an elementwise op does. Blocks of up to 512 MiB in all wait for the next output
of their size; csrc/cpu/memory.h says how.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsemtl.ops.availability import native_module, why_not_native

_SCATTERED_BYTES = 2 << 20  # a huge page


def empty_like(tensor: Tensor) -> Tensor:
    """Return what `torch.empty_like` does for a dense CPU tensor; needs the native module."""
    if tensor.nbytes < native_module().LARGE_BYTES:
        return torch.empty_like(tensor)
    return _from_block(tensor.nbytes, tensor.dtype, tensor.size(), tensor.stride())


def empty_planes(batch: int, channels: int, height: int, width: int) -> Tensor:
    """Return an uninitialised float32 tensor of this shape for a kernel that writes its planes in
    turn: from two MiB on in memory that was used last, of which each plane is on few pages."""
    plane = height * width
    size = 4 * batch * channels * plane
    shape = (batch, channels, height, width)
    if size < _SCATTERED_BYTES:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    return _from_block(size, torch.float32, shape, (channels * plane, plane, width, 1))


def _from_block(
    size: int, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int]
) -> Tensor:
    flat = torch.frombuffer(native_module().Block(size), dtype=dtype)
    # set_ rather than a view: autograd restricts views that a Function returns.
    found = torch.empty(0, dtype=dtype, device="cpu")
    found.set_(flat.untyped_storage(), 0, shape, strides)
    settings: Any = torch.utils.deterministic  # a module whose switches are hidden from mypy
    if torch.are_deterministic_algorithms_enabled() and settings.fill_uninitialized_memory:
        found.fill_(float("nan"))  # as torch.empty does
    return found


def release() -> int:
    """Give the waiting memory back to the system; returns how many bytes that were."""
    if why_not_native() is not None:
        return 0
    waiting = native_module().waiting_bytes()
    native_module().release_memory()
    return waiting
