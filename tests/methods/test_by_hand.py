"""Scores, masks and schedules of the methods, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from sparsemtl.methods import (
    AdapMTLConfig,
    DiSparseStaticConfig,
    IMPConfig,
    LTHConfig,
    MagnitudeConfig,
    OwnLoop,
    RigLConfig,
    SNIPConfig,
    build_method,
)
from sparsemtl.methods.disparse import entry_ratios, union_masks
from sparsemtl.methods.imp import remaining_after, rounds_to
from sparsemtl.methods.topology import (
    budget_of,
    cosine_rate,
    drop,
    grow,
    kept_in_drop,
    update_layer,
)
from sparsemtl.sparsity.allocation import (
    allocated_masks,
    erk_densities,
    layer_budgets,
    within_rooms,
)
from sparsemtl.sparsity.structure import ELEMENT, parse_structure


class TwoLayers(nn.Module):
    """y = c·(a·x) + d·(b·x)"""

    def __init__(self, first: list[float], second: list[float]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor(first)[:, None])
            self.second.weight.copy_(torch.tensor(second)[None])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


PARTS = {"backbone": "first", "head:y": "second"}


def loop(model: nn.Module, inputs: list[float], target: float = 1.0) -> OwnLoop:
    def losses(x: Tensor) -> dict[str, Tensor]:
        return {"y": 0.5 * (model(x) - target).square().mean()}

    batches = [torch.tensor([[x]]) for x in inputs]
    return OwnLoop(model, Adam(model.parameters()), losses, batches)


def masks(model: nn.Module) -> list[list[bool]]:
    return [group[0].reshape(-1).tolist() for group in model.sparsity.masks]


def test_snip_scores_of_a_two_layer_net():
    # y = 1·3 + 2·0.5 = 4, ∂L/∂y = 3: |w·g| of a and c is 3·3, of b and d 3·1; the sum is 24.
    model = TwoLayers([1.0, 2.0], [3.0, 0.5])
    method = build_method(SNIPConfig(sparsity=0.5, init="own"), PARTS)
    method.prepare(model, 10)
    found = method._scores(loop(model, [1.0]), [model.first.weight, model.second.weight])
    assert torch.allclose(found[0].reshape(-1), torch.tensor([9.0, 3.0]) / 24)
    assert torch.allclose(found[1].reshape(-1), torch.tensor([9.0, 3.0]) / 24)
    method.on_start(loop(model, [1.0]))
    assert masks(model) == [[True, False], [True, False]]


@pytest.mark.parametrize(("sums", "first"), [("signed", [18.0, 6.0]), ("absolute", [36.0, 12.0])])
def test_snip_over_two_batches_sums_before_the_absolute_value(sums, first):
    model = TwoLayers([1.0, 2.0], [3.0, 0.5])
    method = build_method(SNIPConfig(sparsity=0.5, init="own", batches=2, sums=sums), PARTS)
    method.prepare(model, 10)

    def losses(batch: Tensor) -> dict[str, Tensor]:
        x, target = batch[:, :1], batch[:, 1:]
        return {"y": 0.5 * (model(x) - target).square().mean()}

    # y = 4: residuals 3 and -9, so w·g of a is 9 and -27, of b 3 and -9
    batches = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 13.0]])]
    state = OwnLoop(model, Adam(model.parameters()), losses, batches)
    weights = [model.first.weight, model.second.weight]
    found = method._scores(state, weights)
    expected = torch.tensor(first)
    assert torch.allclose(found[0].reshape(-1), expected / (2 * expected.sum()))


# Backbone of four weights, heads of two. Ranks (best first) over backbone + own head, of 6:
A = [[torch.tensor([9.0, 7.0, 5.0, 3.0])], [torch.tensor([8.0, 1.0])]]  # b0 h0 b1 b2 b3 h1
B = [[torch.tensor([2.0, 4.0, 6.0, 10.0])], [torch.tensor([9.0, 1.0])]]  # b3 h0 b2 b1 b0 h1
C = [[torch.tensor([1.0, 20.0, 2.0, 3.0])], [torch.tensor([5.0, 4.0])]]  # b1 h0 h1 b3 b2 b0


def disparse(scores: dict[str, list[list[Tensor]]]) -> list[list[Tensor]]:
    names = ["backbone", *(f"head:{task}" for task in scores)]
    shapes = [[(4,)], *([(2,)] for _ in scores)]
    return entry_ratios(scores, names, shapes)


def test_disparse_union_of_two_tasks_with_a_solved_keep_ratio():
    ratios = disparse({"a": A, "b": B})
    flat = [(6 * group[0]).round().int().tolist() for group in ratios]
    assert flat == [[1, 3, 3, 1], [2, 6], [2, 6]]
    # Half of 8 weights: b0 and b3 enter at 1/6, both h0 at 2/6, so the keep ratio is 1/3.
    scores = [[1.0 / layer for layer in group] for group in ratios]
    kept = allocated_masks("disparse", scores, 0.5, ELEMENT)
    expected = union_masks(ratios, 2 / 6 + 1e-9)
    assert [m[0].tolist() for m in kept] == [m[0].tolist() for m in expected]
    assert [m[0].tolist() for m in kept] == [
        [True, False, False, True],
        [True, False],
        [True, False],
    ]


def test_disparse_union_of_three_tasks():
    ratios = disparse({"a": A, "b": B, "c": C})
    flat = [(6 * group[0]).round().int().tolist() for group in ratios]
    assert flat == [[1, 1, 3, 1], [2, 6], [2, 6], [2, 3]]
    scores = [[1.0 / layer for layer in group] for group in ratios]
    kept = allocated_masks("disparse", scores, 0.4, ELEMENT)  # 6 of 10: keep ratio 1/3 again
    assert [m[0].tolist() for m in kept] == [
        [True, True, False, True],
        [True, False],
        [True, False],
        [True, False],
    ]


def test_erk_densities():
    shapes = [(4, 2, 1, 1), (8, 4, 3, 3)]  # Σ/Π: 8/8 = 1 and 18/288 = 1/16
    low = erk_densities(shapes, 0.05)  # 14.8 = ε·(8·1 + 288/16)
    assert low == pytest.approx([14.8 / 26, 14.8 / 26 / 16])
    high = erk_densities(shapes, 0.25)  # ε = 74/26 would pass 1: the first stays dense
    assert high == pytest.approx([1.0, 66 / 288])
    power = erk_densities(shapes, 0.05, power=0.5)  # raw 1 and 1/4
    assert power == pytest.approx([14.8 / 80, 14.8 / 80 / 4])
    assert erk_densities(shapes, 1.0) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
@pytest.mark.parametrize("kept", [0, 1, 7, 100, 295, 296])
def test_layer_budgets_sum_exactly(allocation, kept):
    shapes = [(4, 2, 1, 1), (8, 4, 3, 3)]
    budgets = layer_budgets(shapes, kept, allocation)
    assert sum(budgets) == kept
    assert all(0 <= b <= math.prod(s) for b, s in zip(budgets, shapes, strict=True))


def test_rigl_counts_follow_the_cosine():
    rates = [cosine_rate(t, 100, 0.3) for t in (0, 50, 100, 200)]
    assert rates == pytest.approx([0.3, 0.15, 0.0, 0.0])
    assert [kept_in_drop(1000, r + 1e-12) for r in rates[:3]] == [700, 850, 1000]


def test_rigl_drops_the_smallest_and_grows_the_largest_gradient():
    weight = torch.tensor([[5.0, 1.0, 3.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False, False, False]])
    gradient = torch.tensor([[0.1, 9.0, 0.1, 2.0, 7.0, 0.0]])
    # Three live, rate 2/3: only 5 survives; the just-dropped 1 returns by its gradient, as does 7.
    found = update_layer(weight, mask, gradient, {1: 3}, 2 / 3 + 1e-9, ELEMENT)
    assert found.tolist() == [[True, True, False, False, True, False]]
    # A position without gradient is never grown; what it would replace stays.
    still = update_layer(weight, mask, torch.zeros_like(weight), {1: 3}, 0.7, ELEMENT)
    assert torch.equal(still, mask)
    survivors = drop(weight, mask, {1: 2}, ELEMENT)
    assert survivors.tolist() == [[True, False, True, False, False, False]]
    assert grow(gradient, survivors, {1: 1}, ELEMENT).tolist() == [[0, 1, 0, 0, 0, 0]]


def test_groups_move_whole_and_within_their_size():
    """vector(2) on three output channels: pairs of rows 0 and 1, and row 2 alone at the edge."""
    pairs = parse_structure("vector(2)")
    weight = torch.tensor([[4.0, 1.0, 0.0, 0.0], [4.0, 1.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    mask = weight != 0
    assert budget_of(mask, pairs) == {2: 2, 1: 1}
    gradient = torch.tensor([[0.0, 0.1, 9.0, 2.0], [0.0, 0.1, 0.0, 2.0], [0.0, 8.0, 0.0, 1.0]])
    found = update_layer(weight, mask, gradient, {2: 2, 1: 1}, 0.5, pairs)
    # Of the pairs one goes and (2, 2) comes; (9, 0) would leave a weight at 0. Half of one is none.
    assert found.int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0]]
    # All may go, but only one pair elsewhere has a gradient, so only one goes.
    found = update_layer(weight, mask, gradient, {2: 2, 1: 1}, 1.0, pairs)
    assert found.int().tolist() == [[1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("budgets", "rooms", "expected"),
    [
        ([5, 5], [9, 9], [5, 5]),
        ([9, 6, 3], [5, 9, 9], [5, 9, 4]),
        ([9, 0, 0], [5, 3, 9], [5, 3, 1]),
        ([9, 9], [4, 5], [4, 5]),
    ],
)
def test_budgets_stay_within_rooms(budgets, rooms, expected):
    assert within_rooms(budgets, rooms) == expected


def test_imp_remaining_per_round():
    assert rounds_to(0.9, 0.2) == 11  # 0.8^10 = 0.107, 0.8^11 = 0.086
    assert [remaining_after(r, 0.2, 0.9) for r in (1, 2, 10, 11)] == pytest.approx(
        [0.8, 0.64, 0.8**10, 0.1]
    )
    model = nn.Sequential(nn.Linear(50, 20, bias=False), nn.Linear(20, 5, bias=False))
    method = build_method(IMPConfig(sparsity=0.7, start=0.0, end=1.0), {"backbone": "0", "y": "1"})
    method.prepare(model, 60)
    state = OwnLoop(model, Adam(model.parameters()), None)
    left = {}
    for state.step in range(1, 61):
        method.on_step(state)
        if model.sparsity.masks is not None:
            left[sum(int(m.sum()) for group in model.sparsity.masks for m in group)] = state.step
    assert list(left) == [round(1100 * r) for r in (0.8, 0.64, 0.512, 0.4096, 0.32768, 0.3)]
    assert method.at == [1, 13, 25, 36, 48, 60]


@pytest.mark.parametrize("rewind_to", [0.0, 0.5])
def test_a_ticket_has_its_initial_weights_on_the_mask(rewind_to):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    options = LTHConfig(sparsity=0.75, rewind_to=rewind_to)
    method = build_method(options, {"backbone": "0", "head:y": "1"})
    method.prepare(model, 12)
    optimizer = Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    state = OwnLoop(model, optimizer, None)
    method.on_start(state)
    kept = None
    if rewind_to == 0.0:
        kept = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    end = method.ends[0]
    for state.step in range(1, end + 1):
        model(torch.randn(3, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if state.step == method.rewind_step:
            kept = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        trained = [m.weight.detach().clone() for m in model if isinstance(m, nn.Linear)]
        method.on_step(state)
    now = [p.detach() for p in model.parameters() if p.requires_grad]
    for place, layer in enumerate((model[0], model[1])):
        mask = model.sparsity.masks[place][0]
        assert torch.equal(layer.weight.detach()[mask], kept[2 * place][mask])
        assert (layer.weight.detach()[~mask] == 0).all()
        assert torch.equal(now[2 * place + 1], kept[2 * place + 1])  # the bias too
    flat = torch.cat([t.abs().reshape(-1) for t in trained])
    chosen = torch.cat([g[0].reshape(-1) for g in model.sparsity.masks])
    assert flat[chosen].min() >= flat[~chosen].max()  # chosen by the trained weights
    assert not optimizer.state  # a fresh optimizer
    assert method.schedule_step(end) == pytest.approx(12 * method.rewind_step / method.length)


STRUCTURES = ["element", "vector(4)", "block(4,4)", "channel", "2:4"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structured_masks_hold_whole_groups(structure):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Conv2d(64, 64, 3))
    config = MagnitudeConfig(sparsity=0.75, structure=structure, prune_at=0.0)
    method = build_method(config, {"backbone": "0", "head:y": "1"})
    method.prepare(model, 1)
    method.on_start(OwnLoop(model, Adam(model.parameters()), None))
    kinds = parse_structure(structure)
    dead = 0
    for group in model.sparsity.masks:
        mask = group[0]
        dead += int((~mask).sum())
        if kinds.n_of_m is None:
            alive = kinds.scores(mask.float())
            assert set(alive.unique().tolist()) <= {0.0, 1.0}
        else:
            fours = mask.reshape(64, -1, 4, 3, 3).sum(dim=2)
            assert int(fours.max()) <= 2
    assert dead == round(0.75 * (16 + 64) * 64 * 9)


@pytest.mark.parametrize(
    "config",
    [
        IMPConfig(sparsity=0.75, structure="2:4", fraction=0.1, start=0.0),
        LTHConfig(sparsity=0.75, structure="2:4", rounds=3),
        LTHConfig(sparsity=0.75, structure="channel", rounds=None),
        MagnitudeConfig(sparsity=0.75, structure="1:2", allocation="erk"),
    ],
    ids=["imp", "lth", "channels", "erk"],
)
def test_rounds_on_their_way_do_what_the_structure_can(config):
    """Only the last round must be exact: 2:4 cannot keep 90 %, but it can keep 25 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    method = build_method(config, {"backbone": "0", "head:y": "1"})
    method.prepare(model, 40)
    state = OwnLoop(model, Adam([p for p in model.parameters() if p.requires_grad]), None)
    method.on_start(state)
    for state.step in range(1, 41):
        method.on_step(state)
    kept = sum(int(group[0].sum()) for group in model.sparsity.masks)
    assert kept == 512


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MagnitudeConfig(sparsity=0.3, structure="2:4"), r"nearest is 0\.5000"),
        (SNIPConfig(sparsity=0.95, structure="channel"), r"nearest is 0\.9531"),
        (MagnitudeConfig(sparsity=0.8, structure="block(16,16)"), r"is 0\.7500"),
        (AdapMTLConfig(sparsity=0.8, structure="block(16,16)"), r"is 0\.7500"),
        (RigLConfig(structure="2:4"), "a regrown weight cannot respect N:M"),
    ],
    ids=["n-of-m", "channel", "block", "adapmtl", "rigl"],
)
def test_a_budget_out_of_reach_is_refused_before_training_with_the_nearest(config, message):
    model = nn.Sequential(nn.Linear(32, 8, bias=False), nn.Linear(8, 32, bias=False))
    method = build_method(config, {"backbone": "0", "head:y": "1"})
    with pytest.raises(ValueError, match=message):
        method.prepare(model, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # Weights that are 0 have no place in N:M, which shapes do not tell.
        ({"sparsity": 0.6, "structure": "2:4"}, r"at most 128 of 512 .* a score.* is 0\.7500"),
        ({"sparsity": 0.9999}, "keeps at least one of 512 weights, .*nearest is 0.99804"),
    ],
    ids=["n-of-m", "nothing"],
)
def test_a_budget_out_of_reach_when_pruning_is_refused_with_the_nearest(options, message):
    model = nn.Sequential(nn.Linear(32, 8, bias=False), nn.Linear(8, 32, bias=False))
    nn.init.zeros_(model[0].weight)
    config = MagnitudeConfig(prune_at=0.0, **options)
    method = build_method(config, {"backbone": "0", "head:y": "1"})
    method.prepare(model, 100)
    with pytest.raises(ValueError, match=message):
        method.on_start(OwnLoop(model, Adam(model.parameters()), None))


def test_a_given_keep_ratio_is_for_single_weights():
    with pytest.raises(ValueError, match="structure element with a keep_ratio, got '2:4'"):
        DiSparseStaticConfig(structure="2:4", keep_ratio=0.1)


def test_a_task_without_gradient_in_the_backbone_is_named():
    model = TwoLayers([1.0, 2.0], [3.0, 0.5])

    def losses(x: Tensor) -> dict[str, Tensor]:
        return {"y": model.second(model.first(x).detach()).square().mean()}

    method = build_method(DiSparseStaticConfig(batches=1), PARTS)
    method.prepare(model, 10)
    state = OwnLoop(model, Adam(model.parameters()), losses, [torch.ones(1, 1)])
    with pytest.raises(ValueError, match="task 'y' to have a gradient in the backbone"):
        method.on_start(state)
