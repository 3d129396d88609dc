"""The controller reaches the requested sparsity exactly; masks and histograms behind it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsemtl.sparsity.controller import (
    Controller,
    ControllerConfig,
    cubic_ramp,
    freeze_exactly,
    freeze_survivors,
    solve_common_shift,
)
from sparsemtl.sparsity.mask import kept_count, kth_smallest, top_masks
from sparsemtl.sparsity.sparsify import sparsify
from sparsemtl.sparsity.split import JointSplit, pruning_slopes
from sparsemtl.sparsity.stats import (
    MagnitudeHistogram,
    count_dead,
    overall_sparsity,
    sparsity_report,
)


def two_layers(first: torch.Tensor, second: torch.Tensor) -> nn.Module:
    net = nn.Sequential(
        nn.Linear(first.shape[1], first.shape[0], bias=False),
        nn.Linear(second.shape[1], second.shape[0], bias=False),
    )
    with torch.no_grad():
        net[0].weight.copy_(first)
        net[1].weight.copy_(second)
    return net


def sparsified(first: torch.Tensor, second: torch.Tensor, theta: float = -20.0) -> nn.Module:
    return sparsify(two_layers(first, second), {"backbone": "0", "head:a": "1"}, theta_init=theta)


@given(
    values=st.lists(st.floats(0.0, 2.0**120, width=32), min_size=1, max_size=50),
    data=st.data(),
)
def test_kth_smallest_is_what_a_sort_finds(values, data):
    k = data.draw(st.integers(1, len(values)))
    found = kth_smallest(torch.tensor(values), k)
    assert found == sorted(torch.tensor(values).tolist())[k - 1]


@given(
    numel=st.integers(1, 200),
    sparsity=st.floats(0.0, 1.0, exclude_max=True),
    levels=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_top_masks_keep_the_exact_count_with_ties(numel, sparsity, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (numel,), generator=generator).float()
    parts = [[scores[: numel // 3]], [scores[numel // 3 :].reshape(1, -1)]]
    kept = kept_count(numel, sparsity)
    masks, cut = top_masks(parts, kept)
    flat = torch.cat([m.reshape(-1) for group in masks for m in group])
    assert int(flat.sum()) == kept
    assert [m.shape for g in masks for m in g] == [s.shape for g in parts for s in g]
    if 0 < kept < numel:
        assert scores[flat].min() >= scores[~flat].max() == cut
        tied = (scores == cut).nonzero().squeeze(1)
        order = flat[tied].long()
        assert (order[:-1] >= order[1:]).all()  # ties are kept in the order of their index


@pytest.mark.parametrize("bad", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_sparsity_outside_its_range_is_refused(bad):
    with pytest.raises(ValueError, match=r"Expected .* in \[0, 1\)"):
        kept_count(10, bad)


@given(st.integers(0, 2**31), st.floats(1e-6, 10.0))
@settings(max_examples=30)
def test_the_histogram_counts_to_within_a_bin(seed, scale):
    weight = scale * torch.randn(3000, generator=torch.Generator().manual_seed(seed))
    histogram = MagnitudeHistogram.of([weight[:1000].reshape(10, 100), weight[1000:]])
    for alpha in (0.0, 0.1 * scale, scale, 3 * scale, 1e9):
        exact = int((weight.abs() <= alpha).sum())
        near = int((weight.abs() <= alpha * 1.008).sum())
        below = int((weight.abs() <= alpha * 0.992).sum())
        assert below - 1 <= histogram.count_below(alpha) <= near + 1
        assert abs(histogram.count_below(alpha) - exact) <= near - below + 1


def test_a_sampled_histogram_keeps_the_total():
    weight = torch.randn(10_001)
    histogram = MagnitudeHistogram.of([weight], limit=100)
    assert histogram.count_below(1e9) == 10_001
    assert abs(histogram.count_below(0.6745) / 10_001 - 0.5) < 0.15


@given(sparsity=st.floats(0.0, 0.99), offset=st.floats(-3.0, 3.0))
@settings(max_examples=30)
def test_the_common_shift_gives_the_sparsity(sparsity, offset):
    generator = torch.Generator().manual_seed(0)
    weights = [s * torch.randn(n, generator=generator) for s, n in ((0.1, 5000), (0.01, 3000))]
    histograms = [MagnitudeHistogram.of([w]) for w in weights]
    theta = torch.tensor([-5.0, -5.0 + offset], dtype=torch.float64)
    alpha = torch.sigmoid(solve_common_shift(histograms, theta, sparsity))
    dead = sum(int((w.abs() <= a).sum()) for w, a in zip(weights, alpha, strict=True))
    assert abs(dead / 8000 - sparsity) < 0.005


@pytest.mark.parametrize("target", [0.0, 0.5, 0.83, 0.9, 0.99, 0.9999])
def test_freeze_is_exact_and_leaves_no_survivor_at_zero(target):
    torch.manual_seed(0)
    model = sparsified(torch.randn(40, 50), 0.1 * torch.randn(30, 40))
    with torch.no_grad():
        model.sparsity.theta.copy_(torch.tensor([-1.0, -3.0]))
    freeze_exactly(model.sparsity, target)
    counts = count_dead(model.sparsity)
    assert sum(d for d, _ in counts.values()) == 3200 - kept_count(3200, target)
    report = sparsity_report(model, model.sparsity.components)
    assert report.zeros == 3200 - kept_count(3200, target)


def test_freeze_breaks_ties_by_index():
    model = sparsified(torch.ones(4, 5), torch.ones(3, 4))
    freeze_exactly(model.sparsity, 0.75)
    flat = torch.cat([m.reshape(-1) for group in model.sparsity.masks for m in group])
    assert flat.tolist() == [True] * 8 + [False] * 24
    assert sparsity_report(model, model.sparsity.components).zeros == 24


def test_the_learned_split_decides_who_is_kept():
    torch.manual_seed(0)
    weight = torch.randn(100, 100)
    model = sparsified(weight, weight.clone())
    with torch.no_grad():
        model.sparsity.theta.copy_(torch.tensor([-3.0, -1.0]))  # the head is pruned harder
    freeze_exactly(model.sparsity, 0.5)
    report = sparsity_report(model, model.sparsity.components)
    assert report.components["head:a"] > report.components["backbone"] + 0.2
    assert report.overall == 0.5


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 150])
@pytest.mark.parametrize("target", [0.0, 0.3, 0.95])
def test_any_schedule_length_ends_at_the_target(steps, target):
    torch.manual_seed(0)
    model = sparsified(torch.randn(40, 50), 0.1 * torch.randn(30, 40))
    controller = Controller(ControllerConfig(), model.sparsity, target, steps)
    seen = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for weight in (model[0].weight, model[1].weight):
                weight.mul_(0.99)  # training moves the weights while the thresholds rise
        controller.on_step(step)
        seen.append(overall_sparsity(count_dead(model.sparsity)))
    assert model.sparsity.frozen
    assert abs(seen[-1] - target) <= 0.5 / 3200
    if steps == 150:
        assert all(b >= a - 0.01 for a, b in pairwise(seen))
        frozen_at = next(i for i, s in enumerate(seen) if s == seen[-1])
        assert frozen_at <= 110


@given(sparsity=st.floats(0.3, 0.99), floor=st.floats(0.0, 1.0))
@settings(max_examples=20)
def test_no_group_falls_below_its_floor(sparsity, floor):
    generator = torch.Generator().manual_seed(0)
    model = sparsified(
        0.1 * torch.randn(60, 50, generator=generator),
        1e-4 * torch.randn(40, 60, generator=generator),
    )
    least = floor * (1.0 - sparsity)
    histograms = [MagnitudeHistogram.of(model.sparsity.weights(g)) for g in range(2)]
    theta = model.sparsity.theta.detach().double()
    alpha = torch.sigmoid(solve_common_shift(histograms, theta, sparsity, 1.0 - least))
    alive = (model[1].weight.abs() > alpha[1]).float().mean()
    assert float(alive) >= least - 0.01
    freeze_exactly(model.sparsity, sparsity, floor)
    report = sparsity_report(model, model.sparsity.components)
    assert report.zeros == 5400 - kept_count(5400, sparsity)
    assert 1.0 - report.components["head:a"] >= least - 2 / 2400


def test_free_control_fixes_the_mask_when_the_target_is_crossed():
    torch.manual_seed(0)
    model = sparsified(torch.randn(40, 50), torch.randn(30, 40), theta=-3.0)
    controller = Controller(ControllerConfig(control="free"), model.sparsity, 0.5, 100)
    for step in range(1, 101):
        with torch.no_grad():
            model.sparsity.theta += 0.1
        controller.on_step(step)
        if model.sparsity.frozen:
            break
    assert 0.5 <= overall_sparsity(count_dead(model.sparsity)) < 0.6
    assert step < 100


def test_freezing_survivors_keeps_nan():
    model = sparsified(torch.tensor([[1.0, float("nan"), 0.0]]), torch.ones(2, 1), theta=-2.0)
    freeze_survivors(model.sparsity)
    assert model.sparsity.masks[0][0].tolist() == [[True, True, False]]
    with pytest.raises(ValueError, match="without NaN"):
        top_masks([[torch.tensor([float("nan")])]], 0)


def test_the_ramp_is_monotone_and_ends_at_the_target():
    values = [cubic_ramp(p / 20, 0.9) for p in range(-2, 25)]
    assert values == sorted(values)
    assert values[0] == 0.0
    assert values[-1] == 0.9


def test_the_joint_split_lowers_the_costly_component():
    theta = torch.zeros(3)
    split = JointSplit(3)
    slopes = torch.tensor([10.0, 10.0, 1000.0], dtype=torch.float64)
    for _ in range(20):  # per pruned weight, the first costs most; the third is large, not costly
        split.step(theta, torch.tensor([5.0, 1.0, 100.0]), slopes, 0.1)
    assert theta[0] < theta[1]
    assert theta[0] < theta[2]
    before = theta.clone()
    split.step(theta, torch.zeros(3), slopes, 0.0)
    assert torch.equal(theta, before)


def test_slopes_count_the_weights_near_the_threshold():
    weight = torch.linspace(0.0, 1.0, 10_001)
    slope = pruning_slopes([MagnitudeHistogram.of([weight])], torch.tensor([-2.0]))
    alpha = torch.sigmoid(torch.tensor(-2.0))
    assert slope.item() == pytest.approx(10_000 * float(alpha * (1 - alpha)), rel=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"control": "manual"}, "Expected control in"),
        ({"ramp_start": 0.8}, "Expected 0 <= ramp_start < freeze_at"),
        ({"freeze_at": 1.2}, "Expected 0 <= ramp_start < freeze_at"),
        ({"floor": 1.5}, r"Expected floor in \[0, 1\]"),
        ({"solves": 0}, "Expected solves >= 1"),
    ],
)
def test_bad_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ControllerConfig(**fields)
