"""A step's forward pass compiled, and as a CUDA graph: when it may be one, and what it leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparsemtl.sparsity.controller import freeze_exactly
from sparsemtl.sparsity.sparsify import sparsify
from sparsemtl.training.fast import WARM_UP, CompiledCall, GraphedCall, fast_forward
from sparsemtl.training.runtime import RuntimeConfig


class Capture:
    """Stands for torch's capture: runs what it would record, then calls it; counts both."""

    def __init__(self) -> None:
        self.made, self.replayed = 0, 0

    def __call__(self, module, sample):
        self.made += 1
        for _ in range(3):
            module(*sample)  # running statistics move, random numbers are drawn

        def replay(x):
            self.replayed += 1
            return module(x)

        return replay


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))


def steps(model, call, count, seed=1):
    """Outputs and gradients of each of some steps."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        model.zero_grad()
        y = call(torch.randn(2, 3, 6, 6, generator=rng))
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    return found


def test_a_dense_model_is_captured_once_and_steps_as_before():
    model = network()
    twin, capture = copy.deepcopy(model), Capture()
    call = GraphedCall(model, model, capture, kind="cpu")
    expected, found = steps(twin, twin, 8), steps(model, call, 8)
    for f, e in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(f, e, strict=True))
    assert (capture.made, capture.replayed) == (1, 8 - WARM_UP)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)  # the capture's own runs left no trace


def test_it_waits_for_the_masks_and_follows_what_changes(caplog):
    model, capture = network(), Capture()
    sparsify(model, {"all": ["0", "3"]}, theta_init=-3.0)
    call = GraphedCall(model, model, capture, kind="cpu")
    with caplog.at_level("WARNING"):
        steps(model, call, WARM_UP + 2)
    assert capture.made == 0
    assert caplog.text.count("the masks still move") == 1  # said once
    freeze_exactly(model.sparsity, 0.5)
    steps(model, call, WARM_UP + 2)
    assert (capture.made, capture.replayed) == (1, 2)
    model.sparsity.open = True  # a step that wants dense gradients
    steps(model, call, 1)
    model.sparsity.open = False
    steps(model, call, WARM_UP + 1)
    assert (capture.made, capture.replayed) == (2, 3)
    model[0].weight.data = model[0].weight.data.clone()  # a parameter that moved
    steps(model, call, WARM_UP + 1)
    assert capture.made == 3
    call(torch.randn(1, 3, 6, 6))  # a smaller last batch
    assert (capture.made, capture.replayed) == (3, 4)


def test_what_cannot_be_captured_is_simply_called(caplog):
    model, x = network(), torch.randn(2, 3, 6, 6)
    on_cuda = GraphedCall(model, model, Capture())
    assert on_cuda.why_not(x) == "the batch is on cpu, a CUDA graph needs cuda"
    assert on_cuda(x).requires_grad

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    call = GraphedCall(model, model, refuse, kind="cpu")
    with torch.no_grad():
        assert call.why_not(x) == "the model is not being trained"
    with caplog.at_level("WARNING"):
        steps(model, call, WARM_UP + 3)
    assert call.failed == "capturing failed: operation not permitted when stream is capturing"
    assert caplog.text.count("capturing failed") == 1
    caplog.clear()
    with caplog.at_level("WARNING"):
        assert fast_forward(model, RuntimeConfig(cuda_graph=True), True) is model
    assert "several gradients" in caplog.text
    assert fast_forward(model, RuntimeConfig()) is model


@pytest.mark.parametrize("kernels", [False, True])
def test_compiled_it_computes_the_same_and_leaves_the_model_alone(kernels, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path))
    torch._dynamo.reset()
    model = network()
    sparsify(model, {"all": ["0", "3"]}, theta_init=-3.0)
    freeze_exactly(model.sparsity, 0.5)
    model.sparsity.sparse_kernels = kernels
    twin = copy.deepcopy(model)
    call = CompiledCall(model, backend="eager")
    expected, found = steps(twin, twin, 4), steps(model, call, 2)
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert frames > 0
    found += steps(model, call, 4)[2:]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames  # nothing is redone
    for f, e in zip(found[:2], expected[:2], strict=True):
        for a, b in zip(f, e, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(module) for module in model.modules())
    assert set(model.state_dict()) == set(network().state_dict())
