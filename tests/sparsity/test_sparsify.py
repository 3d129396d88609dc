"""sparsify, the layers it swaps in, freeze and finalize."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from sparsemtl.models.component import find_components
from sparsemtl.sparsity.finalize import finalize
from sparsemtl.sparsity.layers import SparseConv2d, SparseLinear
from sparsemtl.sparsity.sparsify import GROUPINGS, desparsify, sparsify
from sparsemtl.sparsity.stats import sparsity_report

THETA = -4.0  # α = 0.018: some of the weights of a fresh small network are dead


class Reference(nn.Module):
    """Computes a model with its weights soft-thresholded in place, by plain torch."""

    def __init__(self, model: nn.Module, theta: torch.Tensor) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.values = {}
        for g, component in enumerate(find_components(self.model).values()):
            for name, module in component.layers:
                w, alpha = module.weight.detach().requires_grad_(), torch.sigmoid(theta[g])
                shrunk = torch.sign(w) * torch.relu(w.abs() - alpha)
                self.values[f"{name}.weight"] = (w, shrunk)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        substitutes = {name: value for name, (_, value) in self.values.items()}
        return torch.func.functional_call(self.model, substitutes, (x,))


def test_outputs_and_gradients_are_those_of_thresholded_weights(model, image):
    theta = torch.tensor([-4.0, -4.5, -3.5, -4.0], requires_grad=True)
    reference = Reference(model, theta)
    sparsify(model, theta_init=THETA)
    with torch.no_grad():
        model.sparsity.theta.copy_(theta)
    weights = {f"{n}.weight": m.weight for c in model.components().values() for n, m in c.layers}

    total = sum(v.square().sum() for v in model(image).values())
    total.backward()
    expected = sum(v.square().sum() for v in reference(image).values())
    expected.backward()

    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.sparsity.theta.grad, theta.grad, rtol=2e-3, atol=1e-4)
    for name, (leaf, _) in reference.values.items():
        scale = float(leaf.grad.abs().max()) + 1e-12
        torch.testing.assert_close(
            weights[name].grad / scale, leaf.grad / scale, rtol=1e-3, atol=1e-4
        )


def test_state_dict_keys_do_not_change(model):
    dense = copy.deepcopy(model)
    sparsify(model, theta_init=THETA)
    assert list(model.state_dict()) == list(dense.state_dict())
    dense.load_state_dict(model.state_dict())
    model.load_state_dict(dense.state_dict())
    assert model.load_state_dict(dense.state_dict()).missing_keys == []


def test_prefixed_state_dict_keys_do_not_change(model):
    wrapper = nn.ModuleDict({"net": model})
    before = list(wrapper.state_dict())
    sparsify(model, theta_init=THETA)
    assert list(wrapper.state_dict()) == before


def test_copies_are_independent(model, image):
    sparsify(model, theta_init=THETA)
    model.eval()
    twin = copy.deepcopy(model)
    expected = model(image)["depth"]
    with torch.no_grad():
        model.sparsity.theta += 10.0
    assert not torch.equal(model(image)["depth"], expected)
    assert torch.equal(twin(image)["depth"], expected)


def test_a_sparsified_model_pickles(model, image):
    sparsify(model, theta_init=THETA)
    model.eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(image)["depth"], model(image)["depth"])


def test_a_submodule_alone_thresholds_too(model, image):
    sparsify(model, theta_init=THETA)
    model.eval()
    features = model.backbone(image)
    assert torch.equal(model.heads["depth"](features), model(image)["depth"])


def test_values_do_not_outlive_a_failed_forward(model, image):
    sparsify(model, theta_init=THETA)
    with pytest.raises(ValueError, match="Expected image"):
        model(image[0])
    copy.deepcopy(model)


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_groupings_hold_each_weight_once(model, image, grouping):
    total = sum(c.numel for c in model.components().values())
    layers = sum(len(c.layers) for c in model.components().values())
    sparsify(model, grouping=grouping, theta_init=THETA)
    groups = model.sparsity.groups
    assert sum(g.numel for g in groups.values()) == total
    assert len(groups) == {"component": 4, "one": 1, "two": 2, "layer": layers}[grouping]
    model(image)["depth"].sum().backward()
    assert model.sparsity.theta.grad.isfinite().all()


def freeze_half(model: nn.Module) -> None:
    sparsity = model.sparsity
    masks = [
        [torch.rand(w.shape, generator=torch.Generator().manual_seed(3)) > 0.5 for w in group]
        for group in (sparsity.weights(g) for g in range(len(sparsity.groups)))
    ]
    sparsity.freeze(masks, torch.full_like(sparsity.theta, 1e-4))


def test_frozen_masks_hold_whatever_the_weights_do(model, image):
    sparsify(model, theta_init=THETA)
    freeze_half(model)
    dead = sparsity_report(model, model.components()).zeros
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert sparsity_report(model, model.components()).zeros <= dead
    model(image)["depth"].sum().backward()
    for group, masks in enumerate(model.sparsity.masks):
        for weight, mask in zip(model.sparsity.weights(group), masks, strict=True):
            assert weight.grad is None or not weight.grad[~mask].any()


@pytest.mark.parametrize("frozen", [False, True])
def test_finalize_gives_a_plain_model_with_the_same_outputs(model, image, frozen):
    types = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    sparsify(model, theta_init=THETA)
    if frozen:
        freeze_half(model)
    model.eval()
    final = finalize(model)
    assert list(final.state_dict()) == keys
    assert not any(isinstance(m, SparseConv2d | SparseLinear) for m in final.modules())
    assert {name: type(module) for name, module in final.named_modules()} == types
    assert torch.equal(final(image)["depth"], model(image)["depth"])
    assert model.sparsity.frozen == frozen  # the original is untouched
    report = sparsity_report(final, final.components())
    assert report.zeros == sparsity_report(model, model.components()).zeros > 0


def test_desparsify_undoes_sparsify(model, image):
    before = copy.deepcopy(model).eval()
    sparsify(model, theta_init=THETA)
    desparsify(model)
    model.eval()
    assert torch.equal(model(image)["depth"], before(image)["depth"])
    sparsify(model)  # and again


def test_a_users_network_and_linear_layers():
    torch.manual_seed(0)
    net = nn.Sequential()
    net.encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU())
    net.depth_decoder = nn.Linear(8, 1)
    sparsify(net, {"backbone": "encoder", "head:depth": "depth_decoder"}, theta_init=-1.0)
    assert isinstance(net.depth_decoder, SparseLinear)
    assert [g.numel for g in net.sparsity.groups.values()] == [96, 8]
    assert (net.depth_decoder.effective_weight() == 0).any()


def test_tied_weights_are_thresholded_once():
    shared = nn.Linear(6, 6, bias=False)
    net = nn.Sequential(shared, nn.ReLU(), nn.Linear(6, 6, bias=False))
    net[2].weight = shared.weight
    sparsify(net, {"all": ""}, theta_init=-2.0)
    assert net.sparsity.groups["all"].numel == 36
    net(torch.randn(3, 6)).sum().backward()
    assert finalize(net)[2].weight is not None


def test_errors_name_what_is_wrong(model):
    with pytest.raises(ValueError, match=r"Expected grouping in .* got 'both'"):
        sparsify(model, grouping="both")

    class OwnConv(nn.Conv2d):
        pass

    net = nn.Sequential(OwnConv(3, 4, 1))
    with pytest.raises(TypeError, match="got OwnConv at '0'"):
        sparsify(net, {"backbone": "0"})
    sparsify(model)
    with pytest.raises(ValueError, match="already sparsified"):
        sparsify(model)
    with pytest.raises(ValueError, match="Expected a sparsified model"):
        finalize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="masks shaped like the weights"):
        model.sparsity.freeze([[torch.ones(1, dtype=torch.bool)]], model.sparsity.theta)


def test_compiled_and_exported(model, image):
    sparsify(model, theta_init=THETA)
    model.eval()
    with torch.no_grad():
        expected = model(image)["depth"]
        found = torch.compile(model, backend="eager")(image)["depth"]
        torch.testing.assert_close(found, expected)
        program = torch.export.export(model, (image,))
        torch.testing.assert_close(program.module()(image)["depth"], expected)


def test_a_layer_of_the_users_named_sparsity_is_not_taken_for_ours():
    net = nn.Module()
    net.sparsity = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="own `sparsity` is a Linear; rename it"):
        sparsify(net)
