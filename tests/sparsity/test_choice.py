"""Layers that choose between dense and sparse compute the same, remember, and stay repeatable."""

from __future__ import annotations

import copy
import io
import json
from types import SimpleNamespace

import pytest
import torch

from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.sparsity import choice, slot
from sparsemtl.sparsity.choice import BUCKETS, SPARSE, Choices, density_bucket
from sparsemtl.sparsity.controller import freeze_exactly
from sparsemtl.sparsity.layers import SparseConv2d
from sparsemtl.sparsity.passes import DENSE, PassChoice
from sparsemtl.sparsity.sparsify import sparsify
from tests.sparsity.conftest import make_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "CHOICES", Choices())


def passes(model, image):
    """Outputs and every gradient of one forward and backward pass."""
    model.zero_grad()
    outputs = model(image)
    sum(v.square().mean() for v in outputs.values()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return outputs, grads


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "picked", [SPARSE, PassChoice(forward=True), PassChoice(weight_grad=True)], ids=repr
)
def test_sparse_passes_compute_what_dense_ones_do(image, frozen, picked, monkeypatch):
    model = sparsify(make_model(), theta_init=-3.7)
    if frozen:
        freeze_exactly(model.sparsity, 0.8)
    expected, expected_grads = passes(model, image)
    model.sparsity.sparse_kernels = True
    seen = []
    monkeypatch.setattr(choice, "measure", lambda *a: seen.append(1) or picked)
    found, grads = passes(model, image)
    assert seen
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert list(grads) == list(expected_grads)
    for name, value in expected_grads.items():
        scale = value.abs().max() + 1e-12
        torch.testing.assert_close(grads[name] / scale, value / scale, rtol=2e-3, atol=2e-4)


def test_a_real_measurement_runs_and_is_remembered(image, monkeypatch):
    model = sparsify(make_model(), theta_init=-3.7)
    freeze_exactly(model.sparsity, 0.95)
    model.sparsity.sparse_kernels = True
    first, _ = passes(model, image)
    (machine,) = json.loads(choice.cache_file().read_text()).values()
    assert machine
    monkeypatch.setattr(choice, "CHOICES", Choices())  # another process
    monkeypatch.setattr(choice, "measure", lambda *a: pytest.fail("measured again"))
    again, _ = passes(copy.deepcopy(model), image)
    assert torch.equal(first["depth"], again["depth"])


def test_who_measured_first_decides(monkeypatch):
    first, second = Choices(), Choices()
    assert first.keep("a", SPARSE) == SPARSE
    assert second.keep("a", DENSE) == SPARSE
    assert second.find("a") == SPARSE


def test_a_checkpoint_goes_before_the_machines_file():
    run = Choices()
    run.keep("a", SPARSE)
    state = run.state_dict()
    other = Choices()
    other.load_state_dict({"a": [False, False, False]})
    assert other.find("a") == DENSE
    other.load_state_dict(state)
    assert other.find("a") == SPARSE


def test_without_a_writable_cache_layers_stay_dense(monkeypatch, caplog):
    monkeypatch.setenv("SPARSEMTL_CACHE", "/proc/nowhere")
    assert Choices().keep("a", SPARSE) == DENSE
    assert "layers stay dense" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{broken", '{"m": {"k": "x"}}', '{"m": 3}'])
def test_a_damaged_cache_is_measured_anew(content):
    choice.cache_file().parent.mkdir(parents=True)
    choice.cache_file().write_text(content)
    assert Choices().find("k") is None
    assert Choices().keep("k", SPARSE) == SPARSE


def test_dense_layers_are_not_measured(image, monkeypatch):
    model = sparsify(make_model(), theta_init=-9.0)
    model.sparsity.sparse_kernels = True
    monkeypatch.setattr(choice, "measure", lambda *a: pytest.fail("measured a dense layer"))
    passes(model, image)
    assert density_bucket(0.9) is None
    assert density_bucket(0.5) == len(BUCKETS) - 1
    assert density_bucket(0.0) == 0


def test_the_mask_may_move_under_a_sparse_layer(image, monkeypatch):
    model = sparsify(make_model(), theta_init=-3.7)
    model.sparsity.sparse_kernels = True
    monkeypatch.setattr(choice, "measure", lambda *a: SPARSE)
    for _step in range(3):
        with torch.no_grad():
            model.sparsity.theta += 0.1
            for parameter in model.backbone.parameters():
                parameter.mul_(0.95)
        found, _ = passes(model, image)
        model.sparsity.sparse_kernels = False
        expected, _ = passes(model, image)
        model.sparsity.sparse_kernels = True
        torch.testing.assert_close(found["depth"], expected["depth"], rtol=1e-4, atol=1e-5)
    freeze_exactly(model.sparsity, 0.9)
    passes(model, image)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("picked", [DENSE, SPARSE, PassChoice(True), PassChoice(False, True)])
def test_dormant_weights_outside_a_fixed_mask_have_no_effect(
    image, picked, memory_format, monkeypatch
):
    monkeypatch.setattr(choice, "measure", lambda *a: picked)
    model = sparsify(make_model().to(memory_format=memory_format), theta_init=-3.7)
    freeze_exactly(model.sparsity, 0.8)
    expected, expected_grads = passes(model, image)
    with torch.no_grad():  # as momentum would
        for group, masks in enumerate(model.sparsity.masks):
            for weight, mask in zip(model.sparsity.weights(group), masks, strict=True):
                weight.masked_fill_(~mask, 7.0)
    model.sparsity.sparse_kernels = True
    found, grads = passes(model, image)
    torch.testing.assert_close(found["depth"], expected["depth"], rtol=1e-4, atol=1e-5)
    for group, masks in enumerate(model.sparsity.masks):
        for weight, mask in zip(model.sparsity.weights(group), masks, strict=True):
            assert not weight.grad[~mask].any()
            assert weight.grad.stride() == weight.stride() or picked != DENSE
    for name, value in expected_grads.items():
        scale = value.abs().max() + 1e-12
        torch.testing.assert_close(grads[name] / scale, value / scale, rtol=2e-3, atol=2e-4)


def test_a_fixed_mask_is_packed_once_and_its_values_follow(image, monkeypatch):
    monkeypatch.setattr(choice, "measure", lambda *a: SPARSE)
    packed = []
    real = slot.pack_pattern
    monkeypatch.setattr(slot, "pack_pattern", lambda *a, **k: packed.append(1) or real(*a, **k))
    model = sparsify(make_model(), theta_init=-3.7)
    freeze_exactly(model.sparsity, 0.9)
    model.sparsity.sparse_kernels = True
    passes(model, image)
    count = len(packed)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(0.5)
    found, _ = passes(model, image)
    assert len(packed) == count > 0
    model.sparsity.sparse_kernels = False
    torch.testing.assert_close(passes(model, image)[0]["depth"], found["depth"])
    model.sparsity.sparse_kernels = True
    turned = [[m.flip(0) for m in group] for group in model.sparsity.masks]
    model.sparsity.fix_masks(turned, keep_dormant=True)
    moved, _ = passes(model, image)
    assert len(packed) == 2 * count
    model.sparsity.sparse_kernels = False
    torch.testing.assert_close(passes(model, image)[0]["depth"], moved["depth"])


def test_models_with_patterns_copy_and_pickle(image, monkeypatch):
    monkeypatch.setattr(choice, "measure", lambda *a: SPARSE)
    model = sparsify(make_model(), theta_init=-3.7)
    freeze_exactly(model.sparsity, 0.9)
    model.sparsity.sparse_kernels = True
    passes(model, image)
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())


@pytest.mark.parametrize("picked", [DENSE, PassChoice(forward=True), PassChoice(False, True)])
def test_dense_passes_read_one_masked_copy_that_follows(image, picked, monkeypatch):
    monkeypatch.setattr(choice, "measure", lambda *a: picked)
    model = sparsify(make_model(), theta_init=-3.7)
    freeze_exactly(model.sparsity, 0.9)
    model.sparsity.sparse_kernels = True
    passes(model, image)
    layers = [m for m in model.modules() if isinstance(m, SparseConv2d) and m.slot.dense]
    assert layers
    memory = [m.slot.dense.of(m.weight, mask_of(m)).data_ptr() for m in layers]
    for change in (lambda w: w.mul_(0.5), lambda w: w.data.mul_(0.5)):  # torch counts the first
        with torch.no_grad():
            for layer in layers:
                change(layer.weight)
        found, grads = passes(model, image)
        assert memory == [m.slot.dense.of(m.weight, mask_of(m)).data_ptr() for m in layers]
        if not picked.any:  # sparse passes do not see what torch does not count
            model.sparsity.sparse_kernels = False
            expected, expected_grads = passes(model, image)
            model.sparsity.sparse_kernels = True
            assert torch.equal(found["depth"], expected["depth"])
            for name, grad in expected_grads.items():
                torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5)


def mask_of(layer):
    slot = layer.slot
    return slot.sparsity.masks[slot.group][slot.place]


def test_a_backward_that_needs_old_masked_values_is_refused(image, monkeypatch):
    monkeypatch.setattr(choice, "measure", lambda *a: DENSE)
    model = sparsify(make_model(), theta_init=-3.7)
    freeze_exactly(model.sparsity, 0.5)
    model.sparsity.sparse_kernels = True
    once, twice = model(image)["depth"], model(image)["depth"]
    (once.sum() + twice.sum()).backward()  # two passes of the same weights share their copies
    alone = [p.grad.clone() for p in model.backbone.parameters()]
    model.zero_grad()
    (2.0 * model(image)["depth"].sum()).backward()
    for grad, parameter in zip(alone, model.backbone.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-3)
    model.zero_grad()
    old = model(image)["depth"]
    turned = [[m.flip(0) for m in group] for group in model.sparsity.masks]
    model.sparsity.fix_masks(turned, keep_dormant=True)  # the weights stay as they are
    model(image)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.sum().backward()


def test_masks_are_laid_out_with_the_weights():
    model = sparsify(make_model().to(memory_format=torch.channels_last), theta_init=-3.7)
    freeze_exactly(model.sparsity, 0.5)
    before = [[m.clone() for m in group] for group in model.sparsity.masks]
    model.sparsity.lay_out_for_kernels()
    for group, masks in enumerate(model.sparsity.masks):
        for place, (weight, mask) in enumerate(
            zip(model.sparsity.weights(group), masks, strict=True)
        ):
            assert weight.stride() == torch.empty(weight.shape).stride()  # of 1x1 kernels, too
            assert mask.stride() == weight.stride()
            assert torch.equal(mask, before[group][place])


@pytest.mark.parametrize("fixed", [True, False])
def test_a_choice_must_pay_in_the_whole_of_a_step(fixed, monkeypatch):
    """Passes that are faster sparse lose to what comes beside them, here packing and gathering."""
    x = torch.randn(1, 8, 9, 9, requires_grad=True)
    weight, g = torch.randn(8, 8, 3, 3), Geometry((1, 1), (1, 1), (1, 1), (3, 3), 1)
    keep = torch.rand(weight.shape) < 0.3
    weight = weight if fixed else torch.where(keep, weight, 0.0)
    seen = []

    def timed(slow_step):
        def interleave(calls, *_, **__):
            seen.append(list(calls))
            for call in calls.values():
                call()
            slow = {"dense": 1.0, "picked": 1.2 if slow_step else 0.5}
            sparse = {"sparse forward": 0.5, "sparse input_grad": 0.97, "sparse weight_grad": 0.5}
            return {n: SimpleNamespace(best={**slow, **sparse}.get(n, 1.0)) for n in calls}

        return interleave

    for slow_step, expected in ((True, DENSE), (False, PassChoice(True, False, True))):
        monkeypatch.setattr(choice, "interleave", timed(slow_step))
        assert choice.measure(x, weight, None, g, keep if fixed else None) == expected
    assert seen[-1] == ["dense", "picked"]
