"""Learned thresholds on groups: values, gradients, exact budgets, and what is left at the end."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsemtl.methods.adapmtl import AdapMTL, AdapMTLConfig
from sparsemtl.ops.group_threshold import group_threshold_reference
from sparsemtl.sparsity.controller import (
    Controller,
    ControllerConfig,
    freeze_exactly,
    freeze_survivors,
)
from sparsemtl.sparsity.finalize import finalize
from sparsemtl.sparsity.sparsify import sparsify
from sparsemtl.sparsity.stats import count_dead, overall_sparsity, sparsity_report
from sparsemtl.sparsity.structure import n_of_m_mask, parse_structure

NAMES = ["vector(8)", "block(16,16)", "block(4,8)", "channel", "2:4"]
THETA = -5.0  # α = 0.0067: some groups of a fresh small network are dead, none of its layers


def alive_groups(sparsity, structure):
    for g in range(len(sparsity.groups)):
        for place, weight in enumerate(sparsity.weights(g)):
            value = sparsity.effective_weight(g, place, weight).detach()
            yield weight, value, structure.scores((value != 0).float())


@pytest.mark.parametrize("name", NAMES)
def test_layers_compute_with_shrunken_groups(model, image, name):
    dense = copy.deepcopy(model)
    sparsify(model, theta_init=THETA, structure=name)
    structure, alpha = parse_structure(name), torch.sigmoid(torch.tensor(THETA))
    sparse = dict(model.named_modules())
    for layer, module in dense.named_modules():
        if hasattr(sparse[layer], "effective_weight"):
            w = module.weight.detach()
            if structure.n_of_m is not None:
                w = w * n_of_m_mask(w.abs(), *structure.n_of_m)
            value = group_threshold_reference(w, alpha, structure.tile)
            module.weight.data = value
            found = sparse[layer].effective_weight()
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-7)
    found, expected = model(image), dense(image)
    for task in expected:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-3, atol=1e-4)
    sum(v.square().sum() for v in found.values()).backward()
    assert model.sparsity.theta.grad.abs().min() > 0


@pytest.mark.parametrize("target", [0.5, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_the_freeze_meets_the_budget_in_whole_groups(model, image, name, target):
    sparsify(model, theta_init=THETA, structure=name)
    structure = parse_structure(name)
    total = sum(w.numel() for g in range(4) for w in model.sparsity.weights(g))
    freeze_exactly(model.sparsity, target, floor=0.1)
    for _, _, alive in alive_groups(model.sparsity, structure):
        if structure.grouped:
            assert ((alive == 0) | (alive == 1)).all()
    report = sparsity_report(model, model.sparsity.components)
    wanted = total - round(target * total)
    kept = report.weights - report.zeros
    assert kept == wanted if not structure.grouped else wanted - 1e-3 * total < kept <= wanted
    plain = finalize(model)
    model.eval(), plain.eval()
    for task, value in model(image).items():
        torch.testing.assert_close(plain(image)[task], value)


@pytest.mark.parametrize("name", ["block(8,8)", "2:4"])
def test_the_ramp_is_followed(model, name):
    sparsify(model, structure=name)
    config = ControllerConfig(ramp_start=0.0, freeze_at=1.0, floor=0.0)
    controller = Controller(config, model.sparsity, 0.9, 10)
    for step in range(1, 10):
        controller.on_step(step)
        reached = overall_sparsity(count_dead(model.sparsity))
        ramp = 0.9 * (1.0 - (1.0 - step / 10) ** 3)
        assert abs(reached - max(ramp, 0.5 if name == "2:4" else 0.0)) < 0.02
    controller.on_step(10)
    assert model.sparsity.frozen


def test_dead_groups_are_counted_as_they_are(model):
    sparsify(model, theta_init=THETA, structure="block(8,8)")
    counts = count_dead(model.sparsity)
    report = sparsity_report(model, model.sparsity.components)
    assert {n: d for n, (d, _) in counts.items()} == report.component_zeros
    freeze_survivors(model.sparsity)
    assert {n: d for n, (d, _) in count_dead(model.sparsity).items()} == report.component_zeros
    assert sparsity_report(model, model.sparsity.components).component_zeros == (
        report.component_zeros
    )


def test_the_method_passes_its_structure_on(model, image):
    method = AdapMTL(AdapMTLConfig(sparsity=0.8, structure="block(8, 8)"))
    method.prepare(model, steps=4)
    assert str(model.sparsity.structure) == "block(8,8)"
    with pytest.raises(ValueError, match=r"sparsity ≥ 0.5 with 2:4, got 0.3"):
        AdapMTLConfig(sparsity=0.3, structure="2:4")
    with pytest.raises(ValueError, match="parse_structure: Expected one of"):
        AdapMTLConfig(structure="blok")
