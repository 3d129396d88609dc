"""The constant predictor: what it fits, and that nothing constant does better."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemtl.tasks import make_task
from sparsemtl.tasks.constant import StreamingMedian
from tests.tasks.batches import CHANNELS, PIXEL_KINDS, make_batch


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_predicts_one_vector_everywhere(kind):
    task = make_task(kind, kind, CHANNELS[kind])
    batches = [make_batch(kind, seed=seed)[1:] for seed in range(3)]
    constant = task.constant_predictor(iter(batches))
    out = constant(2, 4, 5)
    assert out.shape == (2, CHANNELS[kind], 4, 5)
    assert out.dtype == torch.float32
    assert (out == out[:1, :, :1, :1]).all()
    joined = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.allclose(task.constant_predictor([joined]).value, constant.value)


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_no_other_constant_has_a_lower_error(kind):
    task = make_task(kind, kind, CHANNELS[kind])
    _, target, valid = make_batch(kind, shape=(3, 17, 23))
    if kind == "normals":
        target = F.normalize(target + torch.tensor([0.2, 0.3, 1.0]).view(1, 3, 1, 1), dim=1)
    best = task.constant_predictor([(target, valid)])
    size = (3, 17, 23)

    def error(prediction):
        if kind == "segmentation":
            metrics = task.metrics()
            metrics.update(prediction, target, valid)
            return -metrics.compute()["pixel_accuracy"]
        return float(task.loss(prediction, target, valid))

    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = best.value + torch.randn(best.value.shape, generator=g)
        assert error(best(*size)) <= error(other.view(1, -1, 1, 1).expand(best(*size).shape)) + 1e-3


def test_majority_class_and_ties():
    task = make_task("s", "segmentation", 4)
    target = torch.tensor([[[3, 3, 1, 1, 2, 2, 2]]])
    valid = torch.tensor([[[True, True, True, True, False, False, True]]])
    assert task.constant_predictor([(target, valid)]).value.tolist() == [0, 1, 0, 0]


def test_normals_have_unit_length():
    task = make_task("n", "normals", 3)
    value = task.constant_predictor([make_batch("normals")[1:]]).value
    assert float(value.norm()) == pytest.approx(1.0)


def test_mean_or_median():
    target = torch.tensor([0.5, 1.0, 8.5]).view(1, 1, 1, 3)
    valid = torch.ones(1, 1, 3, dtype=torch.bool)
    for statistic, expected in {"median": 1.0, "mean": 10 / 3}.items():
        task = make_task("d", "depth", 1, constant=statistic)
        assert float(task.constant_predictor([(target, valid)]).value) == pytest.approx(expected)


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_nothing_valid_is_an_error(kind):
    task = make_task("mine", kind, CHANNELS[kind])
    _, target, valid = make_batch(kind)
    for batches in ([], [(target, torch.zeros_like(valid))]):
        with pytest.raises(ValueError, match="mine: Expected at least one valid pixel"):
            task.constant_predictor(batches)


@settings(deadline=None, max_examples=50)  # 8 MiB of counts each
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50))
def test_streaming_median_is_close_below_in_magnitude(values):
    median = StreamingMedian()
    for part in (values[:7], values[7:]):
        median.update(torch.tensor(part))
    exact = float(torch.tensor(values).median())  # torch's is the lower one too
    found = median.compute()
    assert abs(found) <= abs(exact)
    assert found == pytest.approx(exact, rel=2**-11, abs=1e-41)


def test_streaming_median_of_round_numbers_is_exact():
    for value in (0.0, -0.0, 1.0, -1.0, 0.5, -37.25, float("inf"), float("-inf")):
        median = StreamingMedian()
        median.update(torch.full((5,), value))
        assert median.compute() == value
