"""What a CUDA graph promises, kept on a CPU: operations are recorded once and done again later.

As in a capture, no value survives the recording: everything that was computed is poisoned, then
and before every replay, and operations are done again over the tensors that they were recorded
with. Python is not run again. What a capture forbids is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WARM_UP = 2
# A value read by Python, a shape that depends on values, memory of the host brought over.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero")


class RecordedGraph:
    """Stands where `CudaGraph` does."""

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        assert device.type == "cpu"
        for _ in range(WARM_UP):
            call()
        self.recorder = _Recorder()
        with self.recorder:
            self.result = call()
        self.replays = 0
        self._poison()

    def replay(self) -> None:
        self.replays += 1
        self._poison()
        with torch.no_grad():
            for func, args, kwargs, results in self.recorder.done:
                found = func(*args, **kwargs)
                if not func._schema.is_mutable:
                    for old, new in zip(results, tree_leaves(found), strict=True):
                        old.copy_(new)

    def _poison(self) -> None:
        for func, _, _, results in self.recorder.done:
            if not func._schema.is_mutable:
                for result in results:
                    result.fill_(torch.nan if result.is_floating_point() else 1)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        masks = [
            x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype is torch.bool
        ]
        if name in FORBIDDEN or (name == "index" and masks):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            results = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
            self.done.append((func, args, kwargs or {}, results))
        return found
