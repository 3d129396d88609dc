"""Values that an optimizer wrote are used while they are true, and never after."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from sparsemtl.ops.soft_threshold import soft_threshold_stats
from sparsemtl.sparsity import sparsify as sparsify_module
from sparsemtl.sparsity.controller import freeze_exactly
from sparsemtl.sparsity.finalize import finalize
from sparsemtl.sparsity.ready import ReadyGroup, ReadyValues
from sparsemtl.sparsity.sparsify import sparsify

THETA = -4.0


@pytest.fixture
def sparse(model):
    return sparsify(model, theta_init=THETA)


@pytest.fixture
def computed(monkeypatch):
    """The groups that a forward thresholds itself, by the number of their weights."""
    calls = []
    original = sparsify_module.soft_threshold_component

    def spy(weights, alpha, **options):
        calls.append(len(weights))
        return original(weights, alpha, **options)

    monkeypatch.setattr(sparsify_module, "soft_threshold_component", spy)
    return calls


def offer(sparsity, dtype=None, skew=0.0):
    """What an optimizer does at the end of its step; `skew` marks the values for tests."""
    for g in range(len(sparsity.groups)):
        weights = [w.detach() for w in sparsity.weights(g)]
        stats = soft_threshold_stats(
            weights, torch.sigmoid(sparsity.theta.detach())[g], bitmask=True
        )
        values = tuple((v + skew).to(dtype or v.dtype) for v in stats.values)
        found = ReadyGroup(values, stats.nonzeros, stats.bitmasks)
        sparsity.ready.offer(g, sparsity.weights(g), sparsity.theta, found)


def outputs_and_gradients(model, image):
    model.zero_grad()
    outputs = model(image)
    sum(v.square().sum() for v in outputs.values()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {**outputs, **gradients}


def test_outputs_and_every_gradient_are_the_same_bits(sparse, image, computed):
    sparse.eval()  # batch norm's statistics would move
    expected = outputs_and_gradients(sparse, image)
    assert computed == [len(sparse.sparsity.weights(g)) for g in range(4)]
    computed.clear()
    offer(sparse.sparsity)
    for _ in range(2):  # as often as nothing changes
        found = outputs_and_gradients(sparse, image)
        assert computed == []
        assert "sparsity.theta" in found
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_values_offered_are_those_computed_with(sparse, image):
    sparse.eval()
    with torch.no_grad():
        plain = sparse(image)["depth"]
        offer(sparse.sparsity, skew=0.5)
        assert not torch.allclose(sparse(image)["depth"], plain)
        assert sparse.sparsity._values is None


CHANGES = {
    "theta-shifted": lambda m: m.sparsity.theta.add_(0.1),
    "theta-copied": lambda m: m.sparsity.theta.copy_(m.sparsity.theta.clone()),
    "weight-changed": lambda m: m.sparsity.weights(0)[1].mul_(1.1),
    "weight-data": lambda m: setattr(
        m.sparsity.weights(0)[1], "data", m.sparsity.weights(0)[1].clone()
    ),
    "loaded": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
    "resumed": lambda m: m.sparsity.load_resume_state(m.sparsity.resume_state()),
    "value-changed": lambda m: m.sparsity.ready._groups[0][1].values[0].add_(1.0),
    "initialised": lambda m: torch.nn.init.normal_(m.sparsity.weights(0)[0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_stale_values_are_never_used(sparse, image, computed, change):
    sparse.eval()
    offer(sparse.sparsity)
    with torch.no_grad():
        change(sparse)
        found = sparse(image)
        assert len(sparse.sparsity.weights(0)) in computed
        sparse.sparsity.ready.clear()
        expected = sparse(image)
    assert all(torch.equal(found[task], expected[task]) for task in expected)


def test_a_shift_of_theta_spoils_every_group(sparse, image, computed):
    offer(sparse.sparsity)
    with torch.no_grad():
        sparse.sparsity.theta[2].sub_(1.0)
        sparse(image)
    assert len(computed) == 4


def test_a_replaced_parameter_is_noticed(sparse, image, computed):
    offer(sparse.sparsity)
    layer = next(m for m in sparse.modules() if hasattr(m, "slot"))
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    sparse(image)
    assert len(computed) == 1


def test_a_frozen_mask_forgets_them(sparse, image):
    offer(sparse.sparsity, skew=100.0)
    freeze_exactly(sparse.sparsity, 0.8)
    assert sparse.sparsity.ready._groups == {}
    sparse.eval()
    with torch.no_grad():
        found, plain = sparse(image), finalize(sparse)(image)
    assert all(torch.equal(found[k], plain[k]) for k in found)


def test_narrow_values_are_for_autocast_alone(sparse, image, computed):
    sparse.eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            expected = sparse(image)["depth"]
        offer(sparse.sparsity, dtype=torch.bfloat16)
        computed.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sparse(image)["depth"], expected)
        assert computed == []
        assert sparse(image)["depth"].dtype is torch.float32
        assert len(computed) == 4
        with torch.autocast("cpu", torch.float16, enabled=False):
            sparse(image)
        assert len(computed) == 8


def test_gradients_through_narrow_values_are_those_of_autocast(sparse, image):
    sparse.eval()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return outputs_and_gradients(sparse, image)

    expected = run()
    offer(sparse.sparsity, dtype=torch.bfloat16)
    found = run()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_copies_and_files_carry_no_values(sparse, image, computed):
    offer(sparse.sparsity)
    twin = copy.deepcopy(sparse)
    assert twin.sparsity.ready._groups == {}
    assert isinstance(pickle.loads(pickle.dumps(sparse.sparsity.ready)), ReadyValues)
    twin(image)
    assert len(computed) == 4
    sparse(image)
    assert len(computed) == 4


def test_torch_func_sees_through_them(sparse, image):
    sparse.eval()
    offer(sparse.sparsity, skew=100.0)  # values that only the version check lets pass
    weights = dict(sparse.named_parameters())

    def loss(theta):
        called = torch.func.functional_call(sparse, {**weights, "sparsity.theta": theta}, (image,))
        return called["depth"].square().sum()

    gradient = torch.func.grad(loss)(sparse.sparsity.theta.detach().clone())
    sparse.sparsity.ready.clear()
    found = sparse(image)["depth"].square().sum()
    (expected,) = torch.autograd.grad(found, sparse.sparsity.theta)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_backward_needs_the_weights_of_its_forward(sparse, image):
    offer(sparse.sparsity)
    loss = sparse(image)["depth"].sum()
    with torch.no_grad():
        sparse.sparsity.weights(0)[0].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
