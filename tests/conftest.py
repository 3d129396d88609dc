"""What every test shares: the device, poisoned memory, and reproducible randomness."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

# The same examples each time, and no clock: a loaded machine is not a failing test.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Load another build of the native module, before anything imports the installed one."""
    folder = os.environ.get("SPARSEMTL_TEST_NATIVE")  # set by `make sanitize`
    if folder:
        assert "sparsemtl" not in sys.modules
        (path,) = Path(folder, "sparsemtl").glob("_C.*.so")
        spec = importlib.util.spec_from_file_location("sparsemtl._C", path)
        module = sys.modules["sparsemtl._C"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


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
