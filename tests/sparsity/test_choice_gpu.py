"""Which kernel runs a layer on a GPU, in Triton's interpreter: every choice gives one model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsemtl.ops import semi_structured, sparse_conv2d_backends
from sparsemtl.ops.availability import why_not_triton
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.sparsity import candidates_gpu, choice_gpu
from sparsemtl.sparsity.choice import CHOICES
from sparsemtl.sparsity.controller import freeze_exactly
from sparsemtl.sparsity.passes import DENSE, PassChoice
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


def spy(monkeypatch, name) -> list:
    """The calls of a function of choice_gpu, which goes on as before."""
    calls, function = [], getattr(choice_gpu, name)
    monkeypatch.setattr(choice_gpu, name, lambda *a: calls.append(a) or function(*a))
    return calls


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
    carried = spy(monkeypatch, "run_threshold_grad")
    found = run(model, x)
    assert model[0].slot.gpu.picked == chosen
    fused = not frozen and str(chosen.weight_grad).startswith("block")
    assert len(carried) == (4 if fused else 0)  # two layers, two backward passes
    if frozen:  # dead weights' own gradients are no part of a layer's meaning
        masks = [m for group in model.sparsity.masks for m in group]
        for i, mask in zip((2, 4), masks, strict=True):
            expected[i], found[i] = expected[i] * mask, found[i] * mask
    for f, e in zip(found, expected, strict=True):
        scale = e.abs().max().item()
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.interpreter
def test_single_weights_pass_the_threshold_in_the_epilogue(device, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path))
    monkeypatch.setattr(choice_gpu, "measure", lambda *_: CHOSEN["skip"])
    monkeypatch.setattr(CHOICES, "_known", {})
    model, x = small(device)
    if why_not_triton(x) is not None:
        pytest.skip(str(why_not_triton(x)))
    sparsify(model, {"all": ["0", "1"]}, theta_init=-3.0)
    expected = run(model, x)
    model.sparsity.sparse_kernels = True
    carried = spy(monkeypatch, "run_threshold_grad")
    found = run(model, x)
    assert len(carried) == 4  # two layers, two backward passes
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


@pytest.mark.interpreter
def test_a_candidate_that_fails_is_left_out(device, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path))
    monkeypatch.setenv("SPARSEMTL_AUTOTUNE", "0")
    monkeypatch.setattr(CHOICES, "_known", {})
    monkeypatch.setattr(choice_gpu, "ROUNDS", 1)
    monkeypatch.setattr(choice_gpu, "MARGIN", 1e9)  # whatever runs wins
    model, x = small(device)
    if why_not_triton(x) is not None:
        pytest.skip(str(why_not_triton(x)))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("sparse_conv2d_kernel failed on a grid of (9,)")

    monkeypatch.setattr(candidates_gpu, "conv_blocks", broken)
    sparsify(model, {"all": ["0", "1"]}, theta_init=-3.0, structure="block(16,16)")
    model.sparsity.sparse_kernels = True
    with torch.no_grad(), caplog.at_level("WARNING"):
        model(x)
    assert not model[0].slot.gpu.picked.any
    assert "skip forward 0 is left out: sparse_conv2d_kernel failed" in caplog.text


def test_pairs_are_a_candidate_for_matrices_of_two_in_four(monkeypatch, tmp_path):
    """What torch packs and multiplies needs a GPU; the layer's shapes and pattern do not."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    packed = []

    def pack(matrix):
        packed.append(matrix)
        # The form in which the sparse tensor cores take it holds all that is there.
        narrow = matrix.to(torch.bfloat16)
        form = sparse_semi_structured_from_dense_cutlass(narrow)
        assert torch.equal(sparse_semi_structured_to_dense_cutlass(*form), narrow)
        return matrix

    monkeypatch.setattr(semi_structured, "pack", pack)
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(64, 32, 1), nn.ReLU())
    x = torch.randn(2, 64, 5, 4).requires_grad_()
    sparsify(conv, {"all": ["0"]}, theta_init=-4.0, structure="2:4")
    slot = conv[0].slot
    weight = conv[0].effective_weight()
    g = conv[0]._geometry()
    layer = candidates_gpu.make_layer(weight, 1, conv.sparsity.structure, None)
    assert "pair forward" not in candidates_gpu.options_of(layer, x, weight, g)
    monkeypatch.setattr(candidates_gpu, "why_not_semi_structured", lambda *_: None)
    layer.options = candidates_gpu.options_of(layer, x, weight, g)
    assert "pair forward" in layer.options
    layer.picked = PassChoice("pair forward")
    expected = run(conv, x)
    for stamp, packs in (((1,), 1), ((1,), 1), ((2,), 2), (None, 3), (None, 4)):
        conv.zero_grad()
        y = choice_gpu.convolve(layer, x, weight, conv[0].bias, g, stamp=stamp).relu()
        assert len(packed) == packs
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    y.square().sum().backward()
    found = [y.detach(), grad_x, *(p.grad for p in conv.parameters() if p.grad is not None)]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert slot is conv[0].slot
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


PAIRS = {  # x, weight, geometry, part of the reason
    "taps": ((1, 64, 4, 4), (32, 64, 3, 3), {"padding": (1, 1)}, "1x1 kernels of stride 1"),
    "stride": ((1, 64, 4, 4), (32, 64, 1, 1), {"stride": (2, 2)}, "1x1 kernels of stride 1"),
    "padding": ((1, 64, 4, 4), (32, 64, 1, 1), {"padding": (1, 1)}, "1x1 kernels of stride 1"),
    "groups": ((1, 128, 4, 4), (64, 64, 1, 1), {"groups": 2}, "one group"),
    "rows": ((1, 64, 4, 4), (40, 64, 1, 1), {}, "40 x 64 channels, it takes multiples of 32 x 64"),
    "columns": ((1, 96, 4, 4), (32, 96, 1, 1), {}, "32 x 96 channels"),
    "pixels": ((1, 64, 2, 3), (32, 64, 1, 1), {}, "6 pixels"),
    "device": ((1, 64, 4, 4), (32, 64, 1, 1), {}, "on cpu, it needs cuda"),
}


@pytest.mark.parametrize("case", PAIRS.values(), ids=PAIRS.keys())
def test_pairs_say_what_they_do_not_take(case):
    x_shape, w_shape, options, reason = case
    x = torch.empty(x_shape, dtype=torch.bfloat16)
    weight = torch.empty(w_shape, dtype=torch.bfloat16)
    given = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1} | options
    g = Geometry(kernel=w_shape[2:], **given)
    assert reason in semi_structured.why_not_semi_structured(x, weight, g)
    words = semi_structured.why_not_semi_structured(x.float(), weight.float(), g)
    if reason not in words:
        assert "it takes one of bfloat16 and float16" in words


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
    monkeypatch.setattr(candidates_gpu, "why_not_single", lambda *_: None)
    monkeypatch.setattr(candidates_gpu, "single", sparse_conv2d_backends.reference)
    monkeypatch.setattr(
        candidates_gpu, "single_backward", sparse_conv2d_backends.reference_backward
    )
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
