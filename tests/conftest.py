"""What every test shares: the device, poisoned memory, and reproducible randomness."""

from __future__ import annotations

import os
import sys

import pytest
import torch

NATIVE_FROM = os.environ.get("SPARSEMTL_TEST_NATIVE")  # a folder with another build of _C


def pytest_configure(config: pytest.Config) -> None:
    """Load the sanitized build in place of the installed one, if `make sanitize` names it."""
    if NATIVE_FROM:
        import sparsemtl

        sparsemtl.__path__.insert(0, os.path.join(os.path.abspath(NATIVE_FROM), "sparsemtl"))
        assert "sparsemtl._C" not in sys.modules


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the ops are tested: SPARSEMTL_TEST_DEVICE, by default the CPU."""
    return torch.device(os.environ.get("SPARSEMTL_TEST_DEVICE", "cpu"))


@pytest.fixture
def poison():
    """Fill fresh memory with NaN (integers: a large value), to show what a kernel leaves unwritten.

    torch does it itself where deterministic algorithms are asked for.
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)
