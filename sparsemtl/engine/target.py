"""Where an engine computes and in which type, checked before anything is captured or loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsemtl.errors import unknown_choice
from sparsemtl.ops.dispatch import BackendUnavailable

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
Capture = Callable[[Callable[[], Any], torch.device], Any]
Clock = Callable[[Mapping[str, Callable[[], object]], torch.device], dict[str, float]]


@dataclass(frozen=True)
class Target:
    """What the device executor is told.

    device:       where weights and values are; a CUDA device has its index
    dtype:        of arithmetic's inputs and results; None: the model's own
    copy_outputs: whether each call returns tensors of its own, or those that the next overwrites
    capture:      makes one graph of a call, as `cuda_graph.CudaGraph`; None: calls run one by one
    clock:        times candidates, name → seconds; None: as they will run, and kept for later runs
    """

    device: torch.device
    dtype: torch.dtype | None = None
    copy_outputs: bool = True
    capture: Capture | None = None
    clock: Clock | None = None


def make_target(
    who: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    *,
    copy_outputs: bool = True,
) -> Target | None:
    """The target that a caller means; None for the CPU executors.

    raises: BackendUnavailable where there is no such device; TypeError, ValueError
    """
    kind = _dtype(who, dtype)
    if device is None:
        if kind not in (None, torch.float32):
            raise ValueError(
                f"{who}: Expected device='cuda' with dtype {kind}, got none: without a device an "
                "engine computes in the model's type"
            )
        return None
    found = _device(who, device)
    if found.type == "cpu":
        if kind not in (None, torch.float32):
            raise ValueError(
                f"{who}: Expected dtype float32 on the CPU, got {kind}: narrow types are for CUDA"
            )
        return None
    from sparsemtl.cuda_graph import CudaGraph

    return Target(found, kind, copy_outputs, CudaGraph)


def _dtype(who: str, dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"{who}: {unknown_choice('dtype', dtype, DTYPES)}")
        return DTYPES[dtype]
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"{who}: Expected dtype float32, bfloat16 or float16, got {dtype}")
    return dtype


def _device(who: str, device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{who}: Expected device like 'cuda' or 'cpu', got {device!r}") from error
    if found.type == "cpu":
        return found
    if found.type != "cuda":
        raise ValueError(f"{who}: Expected device to be cuda or cpu, got {found}")
    if not torch.cuda.is_available():
        raise BackendUnavailable(f"{who}: Expected a CUDA device for {found}, torch sees none here")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= count:
        raise BackendUnavailable(f"{who}: Expected a CUDA device below cuda:{count}, got {found}")
    return torch.device("cuda", index)
