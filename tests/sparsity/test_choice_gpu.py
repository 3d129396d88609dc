"""Which kernel runs a layer on a GPU, in Triton's interpreter: every choice gives one model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsemtl.ops import sparse_conv2d_backends
from sparsemtl.ops.availability import why_not_triton
from sparsemtl.sparsity import choice_gpu
from sparsemtl.sparsity.choice import CHOICES, DENSE, PassChoice
from sparsemtl.sparsity.controller import freeze_exactly
from sparsemtl.sparsity.sparsify import sparsify

CHOSEN = {
    "dense": DENSE,
    "skip": PassChoice("skip forward 0", "skip input_grad 0", "skip weight_grad 0"),
    "block": PassChoice("block forward 0", "block input_grad 0", "block weight_grad 0"),
    "mixed": PassChoice("block forward 0", False, "block weight_grad 0"),
}


def small(device) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(20, 32, 3, padding=2, dilation=2), nn.Conv2d(32, 5, 1))
    x = torch.randn(1, 20, 6, 5).to(device).requires_grad_()
    return model.to(device), x


def run(model, x):
    model.zero_grad()
    y = model(x)
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    y.square().sum().backward()
    return [y.detach(), grad_x, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.interpreter
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("chosen", CHOSEN.values(), ids=CHOSEN.keys())
def test_every_candidate_computes_the_layer(chosen, frozen, device, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path))
    monkeypatch.setattr(choice_gpu, "measure", lambda *_: chosen)
    monkeypatch.setattr(CHOICES, "_known", {})
    model, x = small(device)
    if why_not_triton(x) is not None:
        pytest.skip(str(why_not_triton(x)))
    sparsify(model, {"all": ["0", "1"]}, theta_init=-3.0, structure="block(16,16)")
    if frozen:
        freeze_exactly(model.sparsity, 0.6)
    expected = run(model, x)
    model.sparsity.sparse_kernels = True
    found = run(model, x)
    assert model[0].slot.gpu.picked == chosen
    if frozen:  # dead weights' own gradients are no part of a layer's meaning
        masks = [m for group in model.sparsity.masks for m in group]
        for i, mask in zip((2, 4), masks, strict=True):
            expected[i], found[i] = expected[i] * mask, found[i] * mask
    for f, e in zip(found, expected, strict=True):
        scale = e.abs().max().item()
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.interpreter
def test_a_measurement_is_made_once_and_kept(device, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path))
    monkeypatch.setenv("SPARSEMTL_AUTOTUNE", "0")
    monkeypatch.setattr(CHOICES, "_known", {})
    monkeypatch.setattr(choice_gpu, "ROUNDS", 1)
    model, x = small(device)
    if why_not_triton(x) is not None:
        pytest.skip(str(why_not_triton(x)))
    calls, measure = [], choice_gpu.measure
    monkeypatch.setattr(choice_gpu, "measure", lambda *a: calls.append(1) or measure(*a))
    sparsify(model, {"all": ["0", "1"]}, theta_init=-3.0, structure="block(16,16)")
    model.sparsity.sparse_kernels = True
    model(x), model(x)
    assert len(calls) == 2  # one for each layer
    assert len(CHOICES.state_dict()) == 2
    assert (tmp_path / "choices.json").exists()
    for slot in (model[0].slot, model[1].slot):
        slot.gpu.picked = None
    model(x)
    assert len(calls) == 2


@pytest.mark.interpreter
def test_single_weights_are_a_candidate_where_few_are_left(device, monkeypatch, tmp_path):
    """The CUDA kernel itself needs a GPU: the reference stands in its place here."""
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path))
    monkeypatch.setattr(CHOICES, "_known", {})
    monkeypatch.setattr(choice_gpu, "why_not_single", lambda *_: None)
    monkeypatch.setattr(choice_gpu, "single", sparse_conv2d_backends.reference)
    monkeypatch.setattr(choice_gpu, "single_backward", sparse_conv2d_backends.reference_backward)
    chosen = PassChoice("single forward", "single input_grad", False)
    monkeypatch.setattr(choice_gpu, "measure", lambda layer, *_: chosen if layer.single else DENSE)
    model, x = small(device)
    if why_not_triton(x) is not None:
        pytest.skip(str(why_not_triton(x)))
    sparsify(model, {"all": ["0", "1"]})
    freeze_exactly(model.sparsity, 0.97, floor=0.5)
    expected = run(model, x)
    model.sparsity.sparse_kernels = True
    found = run(model, x)
    assert model[0].slot.gpu.single is not None
    assert "single forward" in model[0].slot.gpu.options
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_without_a_gpu_nothing_changes():
    model, x = small("cpu")
    if why_not_triton(x) is None:
        pytest.skip("the interpreter stands for a GPU here")
    sparsify(model, {"all": ["0", "1"]})
    model.sparsity.sparse_kernels = True
    model(x)
    assert model[0].slot.gpu is None
