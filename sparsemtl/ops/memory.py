"""Outputs of native ops: large ones come from memory that earlier outputs have given back.

The system's allocator maps every tensor of 32 MiB or more anew, and touching fresh pages costs
several times what an elementwise op does. Blocks of up to 512 MiB in all wait for the next output
of their size; csrc/cpu/memory.h says how.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsemtl.ops.availability import native_module, why_not_native


def empty_like(tensor: Tensor) -> Tensor:
    """Return what `torch.empty_like` does for a dense CPU tensor; needs the native module."""
    module = native_module()
    if tensor.nbytes < module.LARGE_BYTES:
        return torch.empty_like(tensor)
    flat = torch.frombuffer(module.Block(tensor.nbytes), dtype=tensor.dtype)
    # set_ rather than a view: autograd restricts views that a Function returns.
    found = torch.empty(0, dtype=tensor.dtype, device="cpu")
    found.set_(flat.untyped_storage(), 0, tensor.size(), tensor.stride())
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
