"""Groupings against all partitions, rank correlations by hand, gains and their file."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sparsemtl.similarity import best_grouping, correlate, ordering_agreement
from sparsemtl.similarity import grouping as grouping_module
from sparsemtl.similarity.gains import (
    cells_of,
    gain_matrix,
    pair_gains,
    read_gains,
    write_gains,
)
from sparsemtl.similarity.grouping import grouping_value


def symmetric(tasks: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).random((tasks, tasks))
    return (values + values.T) / 2


def planted(sizes: tuple[int, ...]) -> np.ndarray:
    """High inside the blocks, low between them, with noise smaller than the gap."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    same = labels[:, None] == labels[None, :]
    return np.where(same, 0.8, 0.3) + 0.1 * symmetric(len(labels), 1)


def test_a_value_by_hand():
    affinity = np.array([[9.0, 0.5, 0.1], [0.3, 9.0, 0.2], [0.4, 0.6, 9.0]])
    assert grouping_value(affinity, [(0, 1), (2,)], 1.0) == pytest.approx((0.5 + 0.3 + 1.0) / 3)
    whole = (0.5 + 0.1 + 0.3 + 0.2 + 0.4 + 0.6) / 2 / 3
    assert grouping_value(affinity, [(0, 1, 2)], 1.0) == pytest.approx(whole)


@pytest.mark.parametrize("budget", [1, 2, 3, 5])
def test_the_best_of_all_partitions(budget):
    affinity = symmetric(5, budget)
    found = best_grouping(affinity, budget, 1.0)
    best = max(
        grouping_value(affinity, _as_groups(labels), 1.0)
        for labels in itertools.product(range(budget), repeat=5)
    )
    assert found.exhaustive
    assert found.value == pytest.approx(best)
    assert sorted(task for group in found.groups for task in group) == list(range(5))
    assert len(found.groups) <= budget


def _as_groups(labels):
    return [[i for i, v in enumerate(labels) if v == label] for label in sorted(set(labels))]


def test_with_a_network_per_task_similarity_asks_for_no_sharing():
    assert best_grouping(symmetric(4, 0), 4, 1.0).groups == ((0,), (1,), (2,), (3,))


def test_gains_below_zero_ask_for_no_sharing_and_gains_above_for_it():
    assert len(best_grouping(-symmetric(4, 0), 4, 0.0).groups) == 4
    assert len(best_grouping(np.full((4, 4), 2.0), 4, 0.0).groups) == 1  # the fewest of equals


def test_the_search_finds_planted_groups():
    sizes = (4, 3, 5)
    found = best_grouping(planted(sizes), 3, 1.0)
    assert not found.exhaustive
    assert found.groups == ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9, 10, 11))


@pytest.mark.parametrize("seed", range(4))
def test_the_search_agrees_with_all_partitions_where_both_can_look(seed, monkeypatch):
    affinity = symmetric(7, seed)
    best = best_grouping(affinity, 3, 1.0)
    monkeypatch.setattr(grouping_module, "MOST_EXHAUSTIVE", 2)
    found = best_grouping(affinity, 3, 1.0)
    assert found.value == pytest.approx(best.value)


def test_the_diagonal_says_nothing():
    affinity = np.array([[np.nan, -4.0, -1.0], [-6.0, np.nan, -2.0], [1.0, -3.0, np.nan]])
    found = best_grouping(affinity, 2, 0.0)
    assert found.groups == ((0, 2), (1,))
    assert found.value == pytest.approx(0.0)


def test_groupings_refuse_what_they_cannot_use():
    with pytest.raises(ValueError, match=r"shape \[T, T\], got \[2, 3\]"):
        best_grouping(np.zeros((2, 3)), 1, 1.0)
    with pytest.raises(ValueError, match="budget >= 1, got 0"):
        best_grouping(np.zeros((2, 2)), 0, 1.0)
    with pytest.raises(ValueError, match="finite affinities"):
        best_grouping(np.array([[1.0, np.nan], [0.0, 1.0]]), 1, 1.0)


# --- correlation


def test_rank_correlations_by_hand():
    """Ranks 1 2 3 4 against 1 3 2 4: ρ = 1 - 6·2/(4·15), τ = (5 - 1)/6."""
    found = correlate([0.1, 0.2, 0.3, 0.4], [1.0, 5.0, 2.0, 9.0])
    assert found["pairs"] == 4
    assert found["spearman"] == pytest.approx(0.8, abs=1e-5)  # torchmetrics adds an eps
    assert found["kendall"] == pytest.approx(4 / 6)
    opposite = correlate([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert opposite["spearman"] == pytest.approx(-1.0, abs=1e-5)
    assert opposite["kendall"] == pytest.approx(-1.0)


def test_ties_share_a_rank():
    """ρ of ranks (1.5, 1.5, 3) and (1, 2, 3) is 1.5/√3; τ-b is 2/√(2·3)."""
    found = correlate([0.5, 0.5, 0.9], [1.0, 2.0, 3.0])
    assert found["spearman"] == pytest.approx(1.5 / np.sqrt(1.5 * 2.0), abs=1e-5)
    assert found["kendall"] == pytest.approx(2 / np.sqrt(6))


def test_nothing_to_order_gives_no_number():
    assert correlate([0.5, 0.5], [1.0, 2.0])["spearman"] is None
    assert correlate([0.5], [1.0])["kendall"] is None
    with pytest.raises(ValueError, match="one gain per similarity, got 1 and 2"):
        correlate([0.5, 0.6], [1.0])
    with pytest.raises(ValueError, match="NaN"):
        correlate([0.5, float("nan")], [1.0, 2.0])


def test_the_posters_own_orders():
    """Its NYUv2 MCSS row against its co-trained accuracies: seg/sn .865, seg/d .837, sn/d .835."""
    similarity = np.array([[1, 0.865, 0.837], [0.865, 1, 0.835], [0.837, 0.835, 1]])
    gain = np.array([[0, 2, 1], [2, 0, 1], [2, 1, 0]])  # seg, sn, depth: all prefer the first
    assert ordering_agreement(similarity, gain) == (3, 3)
    assert ordering_agreement(similarity, -gain) == (0, 3)
    assert ordering_agreement(np.ones((3, 3)), gain) == (0, 0)


# --- gains

DIRECTIONS = {"a": {"up": True, "down": False}, "b": {"up": True}, "c": {"up": True}}


def test_gains_by_hand():
    measured = {
        ("a",): {"a": {"up": 2.0, "down": 4.0}},
        ("b",): {"b": {"up": 1.0}},
        ("c",): {"c": {"up": 5.0}},
        ("a", "b"): {"a": {"up": 3.0, "down": 3.0}, "b": {"up": 0.9}},
        ("a", "c"): {"a": {"up": 2.0, "down": 4.0}, "c": {"up": 6.0}},
        ("b", "c"): {"b": {"up": 1.2}, "c": {"up": 5.0}},
    }
    assert cells_of(["a", "b", "c"]) == list(measured)
    gains = gain_matrix(["a", "b", "c"], measured, DIRECTIONS)
    expected = [[np.nan, 37.5, 0.0], [-10.0, np.nan, 20.0], [20.0, 0.0, np.nan]]
    np.testing.assert_allclose(gains, expected)
    assert pair_gains(gains) == pytest.approx([13.75, 10.0, 10.0])
    again = read_gains(write_gains(["a", "b", "c"], gains), ["c", "a", "b"])
    np.testing.assert_allclose(again[1, 2], 37.5)
    np.testing.assert_allclose(again[2, 1], -10.0)
    del measured["a", "c"]
    with pytest.raises(ValueError, match=r"a training of \('a', 'c'\), got none"):
        gain_matrix(["a", "b", "c"], measured, DIRECTIONS)


def test_a_gains_file_may_give_one_order_only():
    gains = read_gains("# by hand\ntask_a\ttask_b\tgain\na\tb\t1.5\n\n", ["a", "b"])
    assert gains[0, 1] == gains[1, 0] == 1.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\tmuch\n", "line 1: Expected a finite gain, got 'much'"),
        ("a\tb\tnan\n", "finite gain, got 'nan'"),
        ("a b 1\n", "separated by tabs, got 1 cells"),
        ("a\tb\t1\na\tb\t2\n", "line 2: Expected each pair once"),
        ("a\ta\t1\n", "each pair once"),
        ("a\tdepht\t1\n", "gain of a, depth, got none.*Did you mean 'depht'"),
        ("", "got none"),
    ],
)
def test_bad_gains_files_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        read_gains(text, ["a", "depth"])
