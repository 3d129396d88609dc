"""What the benches share: the gate, the copy, the row of an elementwise op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsemtl.timing import Timing

Call = Callable[[], object]
Shapes = Sequence[tuple[int, ...]]


class WrongResult(RuntimeError):
    """A kernel's result is not the reference's: no number is given."""


def copy_call(bytes_: int, device: torch.device | str = "cpu") -> Call:
    """A copy that moves `bytes_`: half of them read, half of them written."""
    source = torch.ones(max(1, bytes_ // 2), dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def check_close(who: str, found: Tensor, expected: Tensor, rtol: float, atol: float = 0.0) -> float:
    """The largest relative error.   raises: WrongResult if an entry is further off than allowed"""
    found, expected = found.detach().double(), expected.detach().double()
    off = (found - expected).abs()
    good = (off <= atol + rtol * expected.abs()) | (found == expected)
    if not bool(good.all()):
        raise WrongResult(
            f"bench: Expected {who} within {rtol:g} (relative) and {atol:g} (absolute) of the "
            f"float64 reference, got {int((~good).sum())} of {good.numel()} entries further off"
        )
    return (off / expected.abs()).nan_to_num_(0.0, posinf=0.0).max().item() if off.numel() else 0.0


def worst_of(found: Tensor, expected: Tensor, size: float) -> float:
    """Error of a sum, as a share of the sum of absolute values."""
    return ((found.double() - expected).abs() / max(size, 1e-300)).item()


def row(
    case: str,
    kind: str,
    sparsity: float,
    times: Mapping[str, Timing],
    ours: str,
    error: float,
    dense: Sequence[str] = ("eager",),
) -> dict[str, Any]:
    """One row; the roof of an elementwise op is a copy of the bytes that it must move."""
    fastest = min(dense, key=lambda name: times[name].median)
    best = times[ours]
    return {
        "case": case,
        "pass": kind,
        "structure": "element",
        "sparsity": sparsity,
        "dense_path": fastest,
        "dense_ms": digits(1e3 * times[fastest].median),
        "sparse_ms": digits(1e3 * best.median),
        "speedup": digits(times[fastest].median / best.median),
        "spread": round(best.spread, 3),
        "rel_err": float(f"{error:.2g}"),
        "fraction_of_roof": digits(times["copy"].median / best.median),
        "backend": ours,
        "copy_ms": digits(1e3 * times["copy"].median),
        "times_copy": digits(best.median / times["copy"].median),
        "speedup_of_best": digits(times[fastest].best / best.best),
        "dense_spread": round(times[fastest].spread, 3),
        "medians_ms": {name: digits(1e3 * t.median) for name, t in times.items()},
        "rounds": best.rounds,
    }


def digits(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")
