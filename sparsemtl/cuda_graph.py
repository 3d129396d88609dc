"""A call captured as one CUDA graph: launched at once, over memory that stays where it is.

What a call must keep to: tensors that it reads from outside keep their addresses, nothing waits for
the device, and what depends on Python is the same each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

WARM_UP = 3  # runs before a capture: kernels are compiled, cuDNN has searched, caches are filled

# Whether cuDNN searches is a switch of the whole process, and beginning a capture empties torch's
# cache of free memory, which waits for the device: one thread at a time.
_CAPTURING = threading.RLock()


class CudaGraph:
    """A call as a CUDA graph. Its intermediate values live in memory of the graph's own.

    call:   without arguments; run WARM_UP times on a stream of its own before it is captured there
    result: what the captured call returned; each replay writes its tensors anew, in place
    raises: RuntimeError from torch for a call that cannot be captured
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with _CAPTURING, torch.cuda.device(device), torch.no_grad():
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream), _search(True):
                for _ in range(WARM_UP):
                    call()
            torch.cuda.current_stream(device).wait_stream(stream)
            # Other threads may go on allocating: only this one's calls are part of the graph.
            capture = torch.cuda.graph(
                self._graph, stream=stream, capture_error_mode="thread_local"
            )
            with _search(False), _own_workspaces(), capture:
                self.result = call()

    def replay(self) -> None:
        """Run the call again, on the current stream, without waiting for it."""
        self._graph.replay()


def graph_seconds(
    graphs: dict[str, CudaGraph], device: torch.device, rounds: int = 7
) -> dict[str, float]:
    """Best seconds of a replay of each, by the device's clock; they take turns."""
    best = dict.fromkeys(graphs, float("inf"))
    with torch.cuda.device(device):
        for turn in range(1 + rounds):
            for name, graph in graphs.items():
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                graph.replay()
                last.record()
                last.synchronize()
                if turn > 0:  # the first uploads the graph
                    best[name] = min(best[name], first.elapsed_time(last) / 1e3)
    return best


@contextmanager
def _search(wanted: bool) -> Iterator[None]:
    """Whether cuDNN times its algorithms for shapes that are new to it; a search waits."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """cuBLAS allocates its workspace anew, from the graph's memory: graphs that run side by side
    must not share it."""
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()
