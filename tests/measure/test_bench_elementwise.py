"""The gates and rows of `bench threshold` and `bench adam`."""

from __future__ import annotations

import pytest
import torch

from sparsemtl.measure import bench_adam, bench_threshold
from sparsemtl.measure.bench_adam import AdamProblem, check_adam, component_shapes, measure_adam
from sparsemtl.measure.bench_threshold import (
    ThresholdProblem,
    check_threshold,
    measure_threshold,
)
from sparsemtl.measure.roof import measure_roof
from sparsemtl.measure.rows import WrongResult, check_close
from sparsemtl.ops.availability import why_not_native

SHAPES = [(37, 5), (1000,)]
native = pytest.mark.skipif(why_not_native() is not None, reason="needs the native module")


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_the_thresholds_leave_the_sparsity_that_was_asked_for(sparsity):
    problem = ThresholdProblem([(100_000,)], sparsity)
    dead = (problem.weights[0].abs() <= torch.sigmoid(problem.theta)).float().mean()
    assert dead.item() == pytest.approx(sparsity, abs=5e-3)
    adam = AdamProblem([[(100_000,)]], sparsity)
    dead = (adam.weights[0].abs() <= torch.sigmoid(adam.theta)).float().mean()
    assert dead.item() == pytest.approx(sparsity, abs=5e-3)


def test_right_results_pass_both_gates():
    assert check_threshold(ThresholdProblem(SHAPES, 0.9)) < 1e-6
    assert check_adam(lambda: AdamProblem([SHAPES, SHAPES[:1]], 0.9)) < 1e-6


def test_wrong_results_stop_both_gates(monkeypatch):
    right = bench_threshold.soft_threshold_component
    monkeypatch.setattr(
        bench_threshold,
        "soft_threshold_component",
        lambda w, a: tuple(v * (1 + 1e-6) for v in right(w, a)),
    )
    with pytest.raises(WrongResult, match="soft_threshold on"):
        check_threshold(ThresholdProblem(SHAPES, 0.5))
    adam = bench_adam.threshold_adam

    def wrong(weights, *args, **kwargs):
        out = adam(weights, *args, **kwargs)
        weights[0][0] += 1e-5
        return out

    monkeypatch.setattr(bench_adam, "threshold_adam", wrong)
    with pytest.raises(WrongResult, match="the weights within"):
        check_adam(lambda: AdamProblem([SHAPES], 0.5))


def test_check_close_counts_what_is_off():
    expected = torch.tensor([1.0, 2.0, float("nan")], dtype=torch.float64)
    with pytest.raises(WrongResult, match="2 of 3 entries"):
        check_close("it", torch.tensor([1.0, 2.1, 1.0]), expected, rtol=1e-3)


@native
def test_rows_compare_with_eager_and_with_a_copy():
    rows = list(measure_threshold({"small": SHAPES}, [0.9], rounds=3))
    rows += list(measure_adam({"small": [SHAPES]}, [0.9], rounds=3))
    assert [r["pass"] for r in rows] == ["forward + backward", "optimizer", "threshold + optimizer"]
    for row in rows:
        assert row["dense_path"].startswith("eager")
        assert row["times_copy"] == pytest.approx(row["sparse_ms"] / row["copy_ms"], rel=1e-3)
        assert row["fraction_of_roof"] == pytest.approx(1 / row["times_copy"], rel=1e-3)


def test_the_network_has_its_weights():
    count = lambda case: sum(torch.Size(s).numel() for c in component_shapes(case) for s in c)  # noqa: E731
    assert count("deeplab-resnet34") == 90_653_888
    assert count("stage-1") == 6 * 64 * 64 * 9
    assert count("backbone") < count("deeplab-resnet34")


@native
def test_the_roof_is_that_of_the_cores():
    roof = measure_roof()
    assert 1e9 < roof.flops < 1e13
    assert 1e8 < roof.copy_bytes < 1e13
    assert "GFLOP/s" in roof.text()
