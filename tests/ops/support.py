"""Comparison of a backend with the float64 reference, shared by the tests of all ops."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sparsemtl.ops import Op

# Relative error of one rounding to the storage type, with room for one more in fp32 arithmetic.
# The absolute part is half a step of the type's subnormals.
TOLERANCE = {
    torch.float64: (1e-12, 0.0),
    torch.float32: (2e-7, 1e-45),
    torch.bfloat16: (4e-3, 1e-40),
    torch.float16: (5e-4, 3e-8),
}


def backends_of(op: Op) -> list:
    """Parameters for a test over an op's backends; Triton's carry the interpreter mark."""
    marks = {"triton": [pytest.mark.interpreter]}
    return [pytest.param(name, marks=marks.get(name, [])) for name in op.names]


def skip_if_unusable(op: Op, backend: str, *args: object) -> None:
    """Skip with the backend's own reason; on a GPU a GPU backend that cannot run is a failure."""
    reason = op.explain(*args)[backend]
    if reason is None:
        return
    on_gpu = any(isinstance(t, Tensor) and t.is_cuda for t in args)
    if on_gpu and backend in ("triton", "cuda"):
        pytest.fail(f"{op.name} on {backend}: {reason}")
    pytest.skip(reason)


def assert_matches(found: Tensor, expected: Tensor, storage: torch.dtype) -> None:
    """Assert that found is expected, rounded to the storage type; NaN and inf must agree."""
    assert found.dtype is storage, f"expected {storage}, got {found.dtype}"
    rtol, atol = TOLERANCE[storage]
    torch.testing.assert_close(
        found.double().cpu(), expected.double().cpu(), rtol=rtol, atol=atol, equal_nan=True
    )


def assert_sum_matches(found: Tensor, expected: Tensor, terms: Sequence[Tensor]) -> None:
    """Assert that a sum is right to a few roundings of fp32, relative to the size of its terms."""
    size = sum(term.double().abs().sum().item() for term in terms)
    rtol = TOLERANCE[found.dtype][0]
    atol = 3e-7 * size if size == size and size != float("inf") else 0.0
    torch.testing.assert_close(
        found.double().cpu(), expected.double().cpu(), rtol=rtol, atol=atol, equal_nan=True
    )
