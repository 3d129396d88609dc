"""The interleaved timer."""

from __future__ import annotations

import time

import pytest

from sparsemtl.timing import Timing, interleave


def test_calls_take_turns_after_the_warm_up():
    order = []
    found = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, 1)
    assert order == ["a", "b"] * 4
    assert list(found) == ["a", "b"]
    assert all(timing.rounds == 3 for timing in found.values())


def test_the_slower_call_has_the_larger_median():
    found = interleave({"fast": lambda: None, "slow": lambda: time.sleep(0.002)}, 5, 0)
    assert found["slow"].median > 0.002 > found["fast"].median
    slow = found["slow"]
    assert slow.best <= slow.low <= slow.median <= slow.high


def test_a_budget_ends_the_rounds_early_but_not_before_one():
    found = interleave({"nap": lambda: time.sleep(0.01)}, 50, 1, budget=0.05)
    assert 1 <= found["nap"].rounds < 20
    assert interleave({"nap": lambda: time.sleep(0.01)}, 50, 1, budget=0.0)["nap"].rounds == 1


def test_a_budget_leaves_the_least_number_of_rounds():
    found = interleave({"nap": lambda: time.sleep(0.01)}, 50, 0, budget=0.0, least=4)
    assert found["nap"].rounds == 4


def test_a_candidate_settles_before_each_timed_call():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    found = interleave(calls, 2, 0, settle=2)
    assert order == ["a", "a", "a", "b", "b", "b"] * 2
    assert found["a"].rounds == found["b"].rounds == 2


def test_spread_is_the_distance_of_the_quartiles():
    assert Timing(2.0, 1.0, 3.0, 0.5, 4).spread == 1.0
    assert Timing(0.0, 0.0, 0.0, 0.0, 1).spread == 0.0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="at least one call"):
        interleave({})
    with pytest.raises(ValueError, match="rounds ≥ 1 and warmup ≥ 0, got 0 and 3"):
        interleave({"a": lambda: None}, 0)
    with pytest.raises(ValueError, match="settle ≥ 0 and least ≥ 1, got -1 and 1"):
        interleave({"a": lambda: None}, 1, settle=-1)
