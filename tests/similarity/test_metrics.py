"""The four metrics on masks and saliencies small enough to work out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sparsemtl.similarity import metrics
from sparsemtl.similarity.layer_weights import average, layer_weights
from sparsemtl.similarity.masks import Cut, cut_masks, find_cut, keep_ratio, kept_count


def mask(*bits: int) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.bool)


SAL_A = torch.tensor([3.0, 0.0, 4.0, 1.0])
SAL_B = torch.tensor([0.0, 2.0, 4.0, 2.0])


def pair(square: torch.Tensor) -> float:
    assert square.shape == (2, 2)
    assert square.dtype == torch.float64
    torch.testing.assert_close(square, square.T, rtol=0, atol=0, equal_nan=True)
    return float(square[0, 1])


def test_epi_counts_only():
    assert pair(metrics.epi(torch.tensor([3, 1]))) == pytest.approx(1 - 2 / 4)
    assert pair(metrics.epi(torch.tensor([2, 2]))) == 1.0
    assert pair(metrics.epi(torch.tensor([2, 0]))) == 0.0
    assert pair(metrics.epi(torch.tensor([0, 0]))) == 1.0


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (mask(1, 1, 0, 0), mask(0, 1, 1, 0), 1 / 3),
        (mask(1, 0, 1, 0), mask(1, 0, 1, 0), 1.0),  # identical
        (mask(1, 0, 0, 0), mask(0, 1, 1, 1), 0.0),  # disjoint
        (mask(1, 1, 1, 1), mask(0, 0, 0, 0), 0.0),  # one empty
        (mask(0, 0, 0, 0), mask(0, 0, 0, 0), 1.0),  # empty union
    ],
)
def test_iou(a, b, expected):
    assert pair(metrics.iou([a, b])) == pytest.approx(expected)
    assert pair(metrics.iou([a.view(2, 2), b.view(2, 2)])) == pytest.approx(expected)


def test_css():
    expected = (16 + 2) / (math.sqrt(26) * math.sqrt(24))
    assert pair(metrics.css([SAL_A, SAL_B])) == pytest.approx(expected, rel=1e-12)
    assert pair(metrics.css([SAL_A, 1e-7 * SAL_A])) == pytest.approx(1.0, rel=1e-6)
    assert pair(metrics.css([SAL_A, 0 * SAL_A])) == 0.0


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (mask(1, 0, 1, 0), mask(0, 1, 1, 0), 16 / (5 * math.sqrt(20))),
        (mask(1, 0, 0, 0), mask(0, 1, 1, 1), 0.0),  # disjoint
        (mask(0, 0, 0, 0), mask(0, 0, 1, 0), 0.0),  # one empty
        (mask(0, 0, 0, 0), mask(0, 0, 0, 0), 1.0),  # empty union
    ],
)
def test_mcss(a, b, expected):
    assert pair(metrics.mcss([SAL_A, SAL_B], [a, b])) == pytest.approx(expected, rel=1e-12)


def test_mcss_of_identical_networks_is_one():
    one = mask(1, 0, 1, 0)
    assert pair(metrics.mcss([SAL_A, SAL_A.clone()], [one, one])) == pytest.approx(1.0, abs=1e-15)


def test_what_the_released_code_makes_of_an_empty_layer():
    nothing = [mask(0, 0), mask(0, 0)]
    assert math.isnan(pair(metrics.iou(nothing, "released")))
    assert pair(metrics.mcss([torch.ones(2), torch.ones(2)], nothing, "released")) == 0.0
    with pytest.raises(ValueError, match=r"'release'.*Did you mean 'released'"):
        metrics.iou(nothing, "release")


def test_pieces_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(7, 5, generator=generator) for _ in range(3)]
    masks = [row > 0.5 for row in rows]
    whole = metrics.css(rows), metrics.iou(masks), metrics.mcss(rows, masks)
    monkeypatch.setattr(metrics, "PIECE", 4)
    pieces = metrics.css(rows), metrics.iou(masks), metrics.mcss(rows, masks)
    for a, b in zip(whole, pieces, strict=True):
        assert torch.allclose(a, b, rtol=1e-14, atol=0)
    direct = torch.nn.functional.cosine_similarity(
        rows[0].flatten().double(), rows[2].flatten().double(), dim=0
    )
    assert float(whole[0][0, 2]) == pytest.approx(float(direct), rel=1e-12)


def test_joint_iou_of_three_tasks():
    masks = [mask(1, 1, 1, 0), mask(1, 1, 0, 0), mask(0, 1, 1, 0)]
    assert metrics.joint_iou(masks) == pytest.approx(1 / 3)
    assert metrics.joint_iou([mask(0, 0), mask(0, 0)]) == 1.0
    assert torch.equal(masks[0], mask(1, 1, 1, 0))


# --- layer weights

SPARSITY = np.array([[0.1, 0.5, 0.9], [0.3, 0.4, 1.0]])
FILTERS = np.array([[0.0, 1.0, 0.5], [0.0, 0.5, 0.25]])


@pytest.mark.parametrize(
    ("name", "indexing", "expected"),
    [
        ("equal", "layer", [1, 1, 1]),
        ("linear", "layer", [0, 1, 2]),
        ("linear-plus-one", "layer", [1, 2, 3]),
        ("five-zeros", "layer", [0, 0, 0]),
        ("sparsity", "layer", [0.4, 0.9, 1.9]),
        ("sparsity", "filter", [0.0, 1.5, 0.75]),
        ("min-sparsity", "layer", [0.1, 0.4, 0.9]),
        ("min-sparsity", "filter", [0.0, 0.5, 0.25]),
        ("linear", "filter", [0, 1, 2]),  # indexing concerns the masks only
    ],
)
def test_layer_weights(name, indexing, expected):
    assert layer_weights(name, SPARSITY, FILTERS, indexing).tolist() == pytest.approx(expected)


def test_five_zeros_beyond_the_fifth_layer():
    sparsity = np.zeros((2, 8))
    assert layer_weights("five-zeros", sparsity).tolist() == [0, 0, 0, 0, 0, 5, 6, 7]


def test_filter_indexing_needs_enough_filters():
    filters = FILTERS.copy()
    filters[:, 2] = np.nan
    with pytest.raises(ValueError, match="layer 2 has fewer filters"):
        layer_weights("sparsity", SPARSITY, filters, "filter")
    with pytest.raises(ValueError, match=r"'sparse'.*Did you mean 'sparsity'"):
        layer_weights("sparse", SPARSITY, filters)


def test_averages():
    scores, weights = np.array([0.5, 1.0, 0.2]), np.array([0.0, 1.0, 3.0])
    assert average(scores, weights) == pytest.approx((1.0 + 0.6) / 4)
    assert average(scores, weights, "unscaled") == pytest.approx((1.0 + 0.6) / 3)
    assert average(scores, weights, "unscaled", epi=True) == pytest.approx(1 - (3 * 0.8) / 3)
    equal = np.ones(3)
    assert average(scores, equal) == pytest.approx(average(scores, equal, "unscaled"))
    assert average(scores, equal, epi=True) == pytest.approx(
        average(scores, equal, "unscaled", epi=True)
    )
    # the poster's (1/L) Σ w·s for weights of mean 1 is the same number
    scaled = weights / weights.mean()
    assert average(scores, weights) == pytest.approx(average(scores, scaled, "unscaled"))
    with pytest.raises(ValueError, match="sum above 0"):
        average(scores, np.zeros(3))


# --- cuts


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 5, 9, 10, 11, 12])
def test_a_cut_keeps_exactly_as_many_and_the_largest(kept):
    layers = [
        torch.tensor([[0.5, 0.0], [2.0, 0.5]]),
        torch.tensor([0.0, 0.5, 1e-30]),
        torch.tensor([3.0, 0.0, 0.0, 0.0, 1e-30]),
    ]
    masks = list(cut_masks(layers, find_cut(layers, kept)))
    flat, chosen = torch.cat([x.flatten() for x in layers]), torch.cat([m.flatten() for m in masks])
    assert int(chosen.sum()) == kept
    order = torch.sort(flat, descending=True, stable=True).indices[:kept]
    assert chosen.nonzero().flatten().tolist() == sorted(order.tolist())
    assert [m.shape for m in masks] == [x.shape for x in layers]


def test_cuts_of_random_scores():
    generator = torch.Generator().manual_seed(1)
    layers = [torch.rand(n, generator=generator) ** 8 for n in (1, 1000, 37)]
    flat = torch.cat(layers)
    for kept in (1, 17, 500, 1037):
        cut = find_cut(layers, kept)
        assert cut.value == float(torch.sort(flat, descending=True).values[kept - 1])
        assert cut.ties >= 1


def test_cuts_refuse_what_cannot_be_ordered():
    with pytest.raises(ValueError, match="without NaN"):
        find_cut([torch.tensor([1.0, float("nan")])], 1)
    with pytest.raises(ValueError, match=r"kept in \[0, 2\], got 3"):
        find_cut([torch.ones(2)], 3)
    assert find_cut([torch.ones(2)], 0) == Cut(float("inf"), 0)


def test_keep_ratios():
    assert keep_ratio(0.9) == 0.1
    assert keep_ratio(0.9, "disparse-nyuv2") == 0.08
    assert keep_ratio(0.7, "disparse-nyuv2") == 0.257
    assert keep_ratio(0.8, "disparse-nyuv2") == 0.2
    assert kept_count(1000, keep_ratio(0.9)) == 100
    assert kept_count(100, 0.29) == 29
    assert kept_count(7, 0.5) == 3
    with pytest.raises(ValueError, match="sparsity in"):
        keep_ratio(1.0)
