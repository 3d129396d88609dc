"""Δ in both forms, against hand-computed values; it refuses to guess."""

from __future__ import annotations

import math

import pytest

from sparsemtl.tasks import delta

DIRECTIONS = {"seg": {"miou": True, "acc": True}, "depth": {"abs": False}}
REFERENCE = {"seg": {"miou": 0.5, "acc": 0.8}, "depth": {"abs": 0.5}}
METRICS = {"seg": {"miou": 0.55, "acc": 0.76, "other": 1.0}, "depth": {"abs": 0.4}, "more": {}}


def test_mean_form_is_the_default():
    found = delta(METRICS, REFERENCE, DIRECTIONS)
    assert found["tasks"] == {"seg": pytest.approx(2.5), "depth": pytest.approx(20.0)}
    assert found["overall"] == pytest.approx(11.25)
    assert found["form"] == "mean"


def test_sum_form():
    found = delta(METRICS, REFERENCE, DIRECTIONS, form="sum")
    assert found["tasks"] == {"seg": pytest.approx(5.0), "depth": pytest.approx(20.0)}
    assert found["overall"] == pytest.approx(12.5)
    assert found["form"] == "sum"


def test_the_reference_itself_is_at_zero():
    assert delta(REFERENCE, REFERENCE, DIRECTIONS)["overall"] == 0.0


def test_a_metric_that_is_nan_shows():
    found = delta({**METRICS, "depth": {"abs": math.nan}}, REFERENCE, DIRECTIONS)
    assert math.isnan(found["overall"])
    assert math.isnan(found["tasks"]["depth"])
    assert found["tasks"]["seg"] == pytest.approx(2.5)


ERRORS = {
    "task": ({"seg": METRICS["seg"]}, REFERENCE, DIRECTIONS, "metrics to have task 'depth'"),
    "metric": ({**METRICS, "depth": {}}, REFERENCE, DIRECTIONS, "metrics to have depth/abs"),
    "reference-task": (METRICS, {}, DIRECTIONS, "reference to have task 'seg'"),
    "reference-metric": (
        METRICS,
        {**REFERENCE, "seg": {"miou": 1.0}},
        DIRECTIONS,
        r"reference to have seg/acc, got \['miou'\]",
    ),
    "zero": (METRICS, {**REFERENCE, "depth": {"abs": 0.0}}, DIRECTIONS, "depth/abs .* got 0.0"),
    "nan": (METRICS, {**REFERENCE, "depth": {"abs": math.nan}}, DIRECTIONS, "depth/abs .* got nan"),
    "inf": (METRICS, {**REFERENCE, "depth": {"abs": math.inf}}, DIRECTIONS, "depth/abs .* got inf"),
    "no-task": (METRICS, REFERENCE, {}, "at least one task"),
    "no-metric": (METRICS, REFERENCE, {"seg": {}}, "at least one metric of task 'seg'"),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS.keys())
def test_errors_name_the_metric(case):
    *arguments, text = case
    with pytest.raises(ValueError, match=f"delta: Expected .*{text}"):
        delta(*arguments)


def test_unknown_form():
    with pytest.raises(ValueError, match=r"form to be one of .*'mean'"):
        delta(METRICS, REFERENCE, DIRECTIONS, form="median")
