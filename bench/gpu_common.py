"""What the parts of `make gpu` share: sizes, agreement with torch, speed-ups."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.gpu_timing import best

RATES = (6, 12, 18, 24)
Row = dict[str, object]
Job = tuple[str, Callable[[], Row]]  # a case's name, and what measures it
Jobs = Iterator[Job]


class Setting:
    """Sizes; small ones serve to try the sections out in the interpreter."""

    def __init__(self, device: str, small: bool = False) -> None:
        self.device = torch.device(device)
        self.dtype = torch.float32 if small else torch.bfloat16
        self.channels, self.outputs, self.size = (32, 32, 7) if small else (512, 1024, 41)
        self.batches = (1,) if small else (1, 16)
        self.budget = 0.01 if small else 2.0
        self.small = small


def agree(found: Tensor, expected: Tensor, what: str, share: float = 2e-2) -> None:
    """Raise unless found is expected within a few roundings: no number on a red gate."""
    scale = expected.float().abs().max().item()
    error = (found.float() - expected.float()).abs().max().item()
    if not error <= share * scale + 1e-6:
        raise AssertionError(f"{what} differs from torch by {error:g} of {scale:g}")


def speedup(found: dict) -> Row:
    ours, dense, strict = (best(found, p) for p in ("ours", "dense", "deterministic"))
    row: Row = {}
    if ours and dense:
        row["speedup"] = dense / ours
    if ours and strict:
        row["speedup over deterministic"] = strict / ours
    return row
