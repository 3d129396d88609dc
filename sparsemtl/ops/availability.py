"""Which kernels this machine has and which tensors they take, in words where they do not."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

_module: Any
try:  # by name: to import-linter, an import statement would be one of the whole package
    _module = importlib.import_module("sparsemtl._C")
except ImportError as error:
    _module = None
    _no_module = f"sparsemtl._C is not built ({error}); reinstall with a C++17 compiler"

# Triton reads this once, when it is imported; so do we. In its interpreter kernels run on the CPU.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

OLDEST_CAPABILITY = (8, 0)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/views.h


def native_module() -> Any:
    """Return sparsemtl._C; only a backend whose `why_not` has been asked may call this."""
    assert _module is not None, _no_module
    return _module


def why_not_native(tensor: Tensor | None = None) -> str | None:
    """Why the CPU kernels cannot run here, or cannot take this tensor; None if they can."""
    if _module is None:
        return _no_module
    if tensor is None:
        return None
    if not tensor.is_cpu:
        return f"weight is on {tensor.device}, it needs cpu"
    if tensor.dtype not in DTYPES:
        return f"weight is {tensor.dtype}, it takes float32, bfloat16 and float16"
    return None


def why_not_cuda(tensor: Tensor | None = None) -> str | None:
    """Why the CUDA C++ kernels cannot run here, or cannot take this tensor; None if they can."""
    if _module is None:
        return _no_module
    if not _module.HAS_CUDA:
        return "sparsemtl._C was built without nvcc"
    return why_not_on_gpu(tensor)


def why_not_on_gpu(tensor: Tensor | None) -> str | None:
    """The part that CUDA C++ and Triton share: a CUDA device, and a storage type they take."""
    if tensor is not None and not tensor.is_cuda:
        return f"weight is on {tensor.device}, it needs cuda"
    if tensor is None and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if tensor is not None and tensor.dtype not in DTYPES:
        return f"weight is {tensor.dtype}, it takes float32, bfloat16 and float16"
    return why_not_capability(None if tensor is None else tensor.device)


@cache
def why_not_capability(device: torch.device | None) -> str | None:
    """Why a GPU is too old for the kernels: they are compiled for compute capability 8.0 on."""
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has compute capability " + (
            f"{found[0]}.{found[1]}, it needs {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
        )
    return None


def why_not_triton(tensor: Tensor | None = None) -> str | None:
    """Why Triton kernels cannot run here, or cannot take this tensor; None if they can."""
    if INTERPRETING:
        return _no_triton() or _why_not_interpreted(tensor)
    return why_not_on_gpu(tensor) or _no_triton()


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'sparsemtl[triton]'"
    return None


def _why_not_interpreted(tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    if tensor.device.type != "cpu":
        return f"weight is on {tensor.device}, the interpreter needs cpu"
    if tensor.dtype not in (torch.float32, torch.float16):
        return f"weight is {tensor.dtype}, the interpreter is right for float32 and float16 only"
    return None


def launch_errors() -> tuple[type[Exception], ...]:
    """What a kernel that a device cannot run raises: torch's errors, and Triton's own."""
    if _no_triton() is not None:
        return (RuntimeError,)
    errors: Any = importlib.import_module("triton.errors")
    return (RuntimeError, errors.TritonError)
