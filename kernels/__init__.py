"""Triton kernels, a file or two per op; imported by sparsemtl.ops alone.

Kernels share what stands in shared.py. Every launch goes through `launch`, and every table of
addresses through `device_table`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

MOST_PROGRAMS = ((1 << 31) - 1, 65535, 65535)  # along each axis of a CUDA grid
_KEPT = 512  # tables; addresses repeat from step to step, as the allocator reuses memory

_Key = tuple[tuple[tuple[int, ...], ...], torch.device, int]
_known: OrderedDict[_Key, tuple[Tensor, Tensor]] = OrderedDict()
_captured: list[tuple[Tensor, Tensor]] = []  # a replay reads them whenever it comes
_arena: list[Tensor] = []  # pinned bytes left for captures, in which none can be allocated
_ARENA = 1 << 21


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """Run a kernel on the current stream of its first tensor's device; an empty grid runs nothing.

    raises: ValueError for a grid beyond CUDA's; RuntimeError naming the kernel and its arguments
            where it does not compile or the launch fails
    """
    if 0 in grid:
        return
    name = kernel.fn.__name__
    for count, most in zip(grid, MOST_PROGRAMS, strict=False):
        if count > most:
            raise ValueError(f"{name}: Expected a grid within {MOST_PROGRAMS}, got {grid}")
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    try:
        with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: no device at all
            kernel[grid](*arguments, **options)
    except (RuntimeError, TritonError) as error:
        given = ", ".join(_words(a) for a in arguments)
        given += "".join(f", {key}={value}" for key, value in options.items())
        reason = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"{name} failed on a grid of {grid} with ({given}): {reason}") from error


def _words(argument: object) -> str:
    if isinstance(argument, Tensor):
        return f"{str(argument.dtype)[6:]}{list(argument.shape)} at {argument.data_ptr():#x}"
    return str(argument)


def device_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Rows of integers, addresses mostly, as int64 on the device, and kept for the next call.

    They travel through pinned memory without waiting, so that a CUDA graph can hold the copy. What
    a capture makes is its graph's alone: before a replay it holds nothing.
    """
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64)
    key = (rows, device, torch.cuda.current_stream(device).cuda_stream)
    capturing = torch.cuda.is_current_stream_capturing()
    found = _known.get(key)
    if found is None:
        found = _sent(torch.tensor(rows, dtype=torch.int64), device)
        if not capturing:
            _known[key] = found
            while len(_known) > _KEPT:
                _known.popitem(last=False)
    else:
        _known.move_to_end(key)
    if capturing:
        _captured.append(found)
    return found[0]


def device_floats(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers that change from call to call as float32 on the device, without waiting for it."""
    host = torch.tensor(values, dtype=torch.float32)
    if device.type != "cuda":
        return host
    found = _sent(host, device)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(found)
    return found[0]


def _sent(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    if not torch.cuda.is_current_stream_capturing():
        if not _arena:
            _arena.append(torch.empty(_ARENA, dtype=torch.uint8, pin_memory=True))
        pinned = host.pin_memory()
    else:
        if not _arena or _arena[0].numel() < host.nbytes:
            raise RuntimeError(
                f"device_table: Expected {host.nbytes} bytes of pinned memory left for captures, "
                f"got {_arena[0].numel() if _arena else 'none: run the call once before'}"
            )
        taken = -(-host.nbytes // 16) * 16
        pinned = _arena[0][: host.nbytes].view(host.dtype).view(host.shape).copy_(host)
        _arena[0] = _arena[0][taken:]
    return pinned.to(device, non_blocking=True), pinned
