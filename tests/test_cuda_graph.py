"""What `CudaGraph` asks of torch, in which order: a stand-in for torch.cuda writes it down."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from sparsemtl.cuda_graph import WARM_UP, CudaGraph, graph_seconds

DEVICE = torch.device("cuda", 0)


class Stream:
    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: Stream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What was asked of torch.cuda so far."""
    said: list[str] = []
    now = [Stream("current", said)]

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    class Event:
        clock = 0.0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.clock += 1.0
            self.at = Event.clock

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, last: Event) -> float:
            return last.at - self.at

    @contextmanager
    def inside(what: str, stream: Stream | None = None):
        said.append(f"begin {what}")
        if stream is not None:
            now.append(stream)
        try:
            yield
        finally:
            if stream is not None:
                now.pop()
            said.append(f"end {what}")

    def capture(graph, stream, capture_error_mode):
        assert isinstance(graph, Graph)
        return inside(f"capture on {stream.name}, {capture_error_mode}", stream)

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "Stream", lambda device: Stream("side", said))
    monkeypatch.setattr(cuda, "current_stream", lambda device: now[-1])
    monkeypatch.setattr(cuda, "device", lambda device: inside(str(device)))
    monkeypatch.setattr(cuda, "stream", lambda stream: inside(stream.name, stream))
    monkeypatch.setattr(cuda, "graph", capture)
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: said.append("clear"), raising=False
    )
    return said


def test_a_call_is_warmed_up_beside_and_captured_where_it_was_warm(said):
    before = torch.backends.cudnn.benchmark

    def call() -> int:
        assert not torch.is_grad_enabled()
        said.append(f"call, search {torch.backends.cudnn.benchmark}")
        return 7

    graph = CudaGraph(call, DEVICE)
    assert graph.result == 7
    assert said == [
        "begin cuda:0",
        "side waits for current",
        "begin side",
        *["call, search True"] * WARM_UP,
        "end side",
        "current waits for side",
        "clear",
        "begin capture on side, thread_local",
        "call, search False",
        "end capture on side, thread_local",
        "clear",
        "end cuda:0",
    ]
    assert torch.backends.cudnn.benchmark is before
    graph.replay()
    assert said[-1] == "replay"


def test_a_call_that_fails_leaves_the_switch_as_it_was(said):
    before = torch.backends.cudnn.benchmark

    def call() -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        CudaGraph(call, DEVICE)
    assert torch.backends.cudnn.benchmark is before
    assert said[-1] == "end cuda:0"
    assert "clear" not in said


def test_graphs_take_turns_and_the_first_is_not_timed(said):
    graphs = {name: CudaGraph(lambda: None, DEVICE) for name in ("a", "b")}
    said.clear()
    assert graph_seconds(graphs, DEVICE, rounds=3) == {"a": 1e-3, "b": 1e-3}
    assert said == ["begin cuda:0", *["replay"] * 8, "end cuda:0"]
