"""Task weightings against their formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemtl.training.weighting import WEIGHTINGS, WeightingConfig, build_weighting

TASKS = ("a", "b", "c")
SERIES = {
    "a": [2.0, 1.8, 1.6, 1.7, 1.5],
    "b": [0.5, 0.9, 0.3, 0.8, 0.4],
    "c": [1.0, 1.01, 1.0, 0.99, 1.0],
}


def run(config: WeightingConfig, ratio: float = 0.3, steps: int = 100) -> list[dict[str, float]]:
    weighting = build_weighting(config, TASKS, steps, ratio)
    return [weighting({t: SERIES[t][i] for t in TASKS}) for i in range(5)]


def test_adaptive_is_equation_6():
    factors = run(WeightingConfig("adaptive", window=4, warmup=2, most=100.0))[-1]
    fluctuation = {}
    for task, values in SERIES.items():
        window = values[-4:]
        mean = sum(window) / 4
        fluctuation[task] = sum(abs(v - mean) for v in window) / 4 / values[-1]
    mean = sum(fluctuation.values()) / 3
    for task in TASKS:
        expected = 1.0 / (fluctuation[task] / mean) * 5.0 * 0.3
        assert factors[task] == pytest.approx(expected)
    assert factors["c"] > factors["a"] > factors["b"]  # steadier loss, larger factor


def test_all_factors_are_1_during_the_warm_up():
    factors = run(WeightingConfig("adaptive", window=4, warmup=3))
    assert factors[:3] == [dict.fromkeys(TASKS, 1.0)] * 3
    assert factors[3] != dict.fromkeys(TASKS, 1.0)


def test_window_and_warm_up_scale_with_the_schedule():
    weighting = build_weighting(WeightingConfig("adaptive"), TASKS, 20_000, 0.3)
    assert (weighting.window, weighting.warmup) == (400, 5_000)


def test_the_released_variant_is_direct_and_sums_to_the_tasks():
    factors = run(WeightingConfig("adaptive-released", window=4, warmup=2))[-1]
    change = {}
    for task, values in SERIES.items():
        window = values[-4:]
        steps = [abs(x - y) / y for x, y in pairwise(window)]
        change[task] = sum(steps) / 3
    for task in TASKS:
        assert factors[task] == pytest.approx(3 * change[task] / sum(change.values()))
    assert factors["b"] > factors["a"] > factors["c"]


@given(
    st.lists(
        st.tuples(*[st.floats(0.0, 1e6) for _ in TASKS]),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(list(WEIGHTINGS)),
)
def test_factors_are_finite_and_not_negative_for_any_losses(losses, name):
    weighting = build_weighting(WeightingConfig(name, window=3, warmup=1), TASKS, 10, 0.5)
    for row in losses:
        factors = weighting(dict(zip(TASKS, row, strict=True)))
        assert list(factors) == list(TASKS)
        assert all(math.isfinite(f) and f >= 0.0 for f in factors.values())


@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_state_round_trip(name):
    config = WeightingConfig(name, window=3, warmup=1)
    first = build_weighting(config, TASKS, 10, 0.5)
    for i in range(3):
        first({t: SERIES[t][i] for t in TASKS})
    second = build_weighting(config, TASKS, 10, 0.5)
    second.load_state_dict(first.state_dict())
    losses = {t: SERIES[t][3] for t in TASKS}
    assert first(losses) == second(losses)


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match=r"Expected weighting to be one of \['fixed', 'adaptive'"):
        WeightingConfig("adaptiv")
