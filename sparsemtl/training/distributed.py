"""Several processes as one run. torchrun starts them; what they compute is averaged.

Each process holds the whole model, takes its slice of every batch and averages gradients, losses,
scores and running statistics with the others, so that weights and masks are equal everywhere. The
first process writes the files. Without torchrun there is one process and all of this does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 1 << 24  # elements that are averaged in one call: a bounded copy, few messages


def size() -> int:
    """Processes of this run."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _joined() else 0


def is_main() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def join() -> None:
    """Meet the processes that torchrun started; nothing without it.

    CPU tensors travel by gloo, CUDA tensors by NCCL.
    """
    if _joined() or int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ:
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    """Part from the other processes, when all are done."""
    if _joined():
        barrier()  # one that leaves early can take the others' connections along
        dist.destroy_process_group()


def local_rank() -> int:
    """The number of this process on its machine: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier() -> None:
    """Wait until every process is here."""
    if size() > 1:
        gather(None)


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in place; the same bits everywhere.

    tensors: floating point, of equal shapes and order in each process
    """
    if size() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        for bucket in _buckets(alike):
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            flat /= size()
            parts = flat.split([t.numel() for t in bucket])
            with torch.no_grad():
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.reshape(tensor.shape))


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return any(gather(flag))


def gather(value: Any) -> list[Any]:
    """The `value` of each process, in rank order, in every process."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if buckets[-1] and filled + tensor.numel() > BUCKET:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.numel()
    return [b for b in buckets if b]
