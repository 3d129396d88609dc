"""Metrics: hand-computed values, conventions, pooling, ranks, and what is NaN."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsemtl.tasks import RELEASED, make_task
from sparsemtl.tasks.normals import angle_between
from tests.tasks.batches import CHANNELS, PIXEL_KINDS, make_batch


def scores(labels, classes):
    """Scores [1, C, H, W] whose largest is `labels` [H][W]."""
    return F.one_hot(torch.tensor([labels]), classes).permute(0, 3, 1, 2).float()


def all_valid(*shape):
    return torch.ones(shape, dtype=torch.bool)


def measure(task, *batches):
    metrics = task.metrics()
    for batch in batches:
        metrics.update(*batch)
    return metrics.compute()


@pytest.mark.parametrize("kind", PIXEL_KINDS)
@pytest.mark.parametrize("released", [False, True])
def test_names_match_the_directions(kind, released):
    task = make_task(kind, kind, CHANNELS[kind], **(RELEASED[kind] if released else {}))
    found = measure(task, make_batch(kind))
    assert list(found) == list(task.higher_is_better)
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


# target    predicted      IoU: 0: 2/3, 1: 1/3, 2: 0/1 (predicted only), 3: 0/0
TARGET, PREDICTED = [[0, 0, 1, 1]], [[0, 0, 0, 1]]


def test_miou_conventions():
    target, valid = torch.tensor([TARGET]), all_valid(1, 1, 4)
    both = {
        name: measure(
            make_task("s", "segmentation", 4, miou_convention=name),
            (scores([[0, 0, 0, 2]], 4), target, valid),
        )["miou"]
        for name in ("all", "released")
    }
    # class 0: 2/3, class 1: 0/2, class 2: 0/1, class 3 in neither
    assert both["all"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert both["released"] == pytest.approx(2 / 3)


def test_miou_and_accuracy_by_hand():
    found = measure(
        make_task("s", "segmentation", 4),
        (scores(PREDICTED, 4), torch.tensor([TARGET]), all_valid(1, 1, 4)),
    )
    assert found == {"miou": pytest.approx((2 / 3 + 1 / 2) / 2), "pixel_accuracy": 0.75}


def test_all_wrong_is_zero_in_both_conventions():
    for name in ("all", "released"):
        task = make_task("s", "segmentation", 3, miou_convention=name)
        found = measure(
            task, (scores([[1, 1]], 3), torch.zeros(1, 1, 2).long(), all_valid(1, 1, 2))
        )
        assert found == {"miou": 0.0, "pixel_accuracy": 0.0}


def test_masked_pixels_are_in_no_confusion():
    target = torch.tensor([[[0, 1, 255, -7]]])
    valid = torch.tensor([[[True, True, False, False]]])
    found = measure(make_task("s", "segmentation", 3), (scores([[0, 1, 2, 2]], 3), target, valid))
    assert found == {"miou": 1.0, "pixel_accuracy": 1.0}


def test_predictions_are_nearest_upsampled():
    prediction = scores([[0, 1], [2, 3]], 4)
    target = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]])
    assert measure(make_task("s", "segmentation", 4), (prediction, target, all_valid(1, 4, 4))) == {
        "miou": 1.0,
        "pixel_accuracy": 1.0,
    }


def test_segmentation_against_numpy():
    prediction, target, valid = make_batch("segmentation", seed=4)
    found = measure(make_task("s", "segmentation", 5), (prediction, target, valid))
    up = F.interpolate(prediction, target.shape[-2:], mode="nearest-exact").argmax(1)
    p, t = up[valid].numpy(), target[valid].numpy()
    iou = [((p == c) & (t == c)).sum() / ((p == c) | (t == c)).sum() for c in range(5)]
    assert found["miou"] == pytest.approx(np.mean(iou))
    assert found["pixel_accuracy"] == pytest.approx((p == t).mean())


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_pooling_over_pixels_does_not_depend_on_batches(kind):
    task = make_task(kind, kind, CHANNELS[kind])
    prediction, target, valid = make_batch(kind, shape=(6, 9, 11))
    valid[0, :5] = False
    together = measure(task, (prediction, target, valid))
    parts = [(prediction[i], target[i], valid[i]) for i in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert measure(task, *parts) == pytest.approx(together, rel=1e-12)


@pytest.mark.parametrize("kind", ["segmentation", "depth", "keypoints", "edges"])
def test_released_pooling_weighs_batch_means_by_batch_size(kind):
    name = "pixel_accuracy" if kind == "segmentation" else "abs_err"
    pixels = make_task(kind, kind, CHANNELS[kind])
    batches = make_task(kind, kind, CHANNELS[kind], pooling="batches")
    prediction, target, valid = make_batch(kind, shape=(4, 9, 11))
    valid[0, 2:] = False
    parts = [(prediction[i], target[i], valid[i]) for i in (slice(0, 1), slice(1, 4))]
    one, three = (measure(pixels, part)[name] for part in parts)
    assert measure(batches, *parts)[name] == pytest.approx((one + 3 * three) / 4)
    none = (prediction, target, torch.zeros_like(valid))
    assert measure(batches, *parts, none)[name] == pytest.approx((one + 3 * three) / 4)


def test_normals_by_hand():
    angles = torch.tensor([0.0, 10.0, 11.25, 20.0, 25.0, 60.0, 90.0, 180.0]).deg2rad()
    prediction = torch.stack([angles.sin(), torch.zeros(8), angles.cos()])[None, :, None] * 7
    target = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 1, 8)
    keep = [0, 1, 3, 4, 5, 6, 7]
    found = measure(
        make_task("n", "normals", 3),
        (prediction[..., keep].double(), target[..., keep], all_valid(1, 1, 7)),
    )
    assert found == pytest.approx(
        {
            "mean": 385 / 7,
            "median": 25.0,
            "within_11.25": 200 / 7,
            "within_22.5": 300 / 7,
            "within_30": 400 / 7,
        },
        abs=1e-4,
    )


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 1001])
def test_median_is_exact_to_half_a_bin(count):
    g = torch.Generator().manual_seed(count)
    prediction, target = torch.randn(2, 1, 3, 1, count, generator=g)
    found = measure(make_task("n", "normals", 3), (prediction, target, all_valid(1, 1, count)))
    angle = angle_between(prediction[0, :, 0].T, target[0, :, 0].T)
    assert found["median"] == pytest.approx(float(np.median(angle.numpy())), abs=0.000501)
    assert found["mean"] == pytest.approx(float(angle.mean()))


def test_perfect_normals_are_at_zero_degrees():
    _, target, valid = make_batch("normals")
    found = measure(make_task("n", "normals", 3), (target * 3.7, target, valid))
    assert found["mean"] < 1e-4
    assert found["median"] == 0.0
    assert found["within_11.25"] == 100.0


def test_a_vector_without_length_is_at_90_degrees():
    _, target, valid = make_batch("normals")
    found = measure(make_task("n", "normals", 3), (torch.zeros_like(target), target, valid))
    assert found["mean"] == found["median"] == 90.0


def test_angles_against_arccos():
    a, b = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0)).double()
    expected = torch.acos(F.cosine_similarity(a, b).clamp(-1, 1)).rad2deg()
    torch.testing.assert_close(angle_between(a, b), expected, rtol=0, atol=1e-5)


def test_encoded_normals_have_names_of_their_own():
    _, target, valid = make_batch("normals")
    task = make_task("n", "normals", 3, normals_space="encoded")
    found = measure(task, ((target + 1) * 127.5, (target + 1) * 127.5, valid))
    assert list(found) == [
        "mean_encoded",
        "median_encoded",
        "within_11.25_encoded",
        "within_22.5_encoded",
        "within_30_encoded",
    ]
    assert not set(found) & set(make_task("n", "normals", 3).higher_is_better)


def depth_of(prediction, target, **options):
    shape = (1, 1, 1, len(target))
    batch = (torch.tensor(prediction).view(shape), torch.tensor(target).view(shape))
    return measure(make_task("d", "depth", 1, **options), (*batch, all_valid(1, 1, len(target))))


def test_depth_by_hand():
    found = depth_of([1.0, 3.0, 6.0, 0.5], [1.0, 2.0, 4.0, 2.0])
    assert found == pytest.approx(
        {
            "abs_err": (0 + 1 + 2 + 1.5) / 4,
            "rel_err": (0 + 0.5 + 0.5 + 0.75) / 4,
            "delta_1.25": 25.0,
            "delta_1.25^2": 75.0,
            "delta_1.25^3": 75.0,
        }
    )


def test_depths_that_are_not_positive_are_wrong_unless_released():
    prediction, target = [-1.0, 0.0, 2.0, 1.25], [1.0, 1.0, 2.0, 1.0]
    paper, released = (
        depth_of(prediction, target, delta_rule=rule)["delta_1.25"]
        for rule in ("positive", "released")
    )
    assert paper == 25.0  # the bound itself is out
    assert released == 75.0  # a negative prediction and the bound are in


def test_a_true_depth_of_zero_enters_no_ratio():
    found = depth_of([1.0, 2.0], [0.0, 2.0])
    assert found["abs_err"] == 0.5
    assert found["rel_err"] == 0.0
    assert found["delta_1.25"] == 100.0


@pytest.mark.parametrize("kind", ["keypoints", "edges"])
def test_maps_by_hand(kind):
    prediction, target = torch.tensor([[[[0.5, -1.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    found = measure(make_task("k", kind, 1), (prediction, target, all_valid(1, 1, 2)))
    assert found == {"abs_err": 1.25}


@pytest.mark.parametrize("kind", PIXEL_KINDS)
@pytest.mark.parametrize("released", [False, True])
def test_no_valid_pixel_gives_nan_and_never_fails(kind, released):
    prediction, target, valid = make_batch(kind)
    task = make_task(kind, kind, CHANNELS[kind], **(RELEASED[kind] if released else {}))
    found = measure(task, (prediction, target, torch.zeros_like(valid)))
    assert list(found) == list(task.higher_is_better)
    assert all(math.isnan(value) for value in found.values())


@pytest.mark.parametrize("kind", PIXEL_KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prediction_that_is_not_finite_spoils_every_metric(kind, value):
    prediction, target, valid = make_batch(kind, small=(17, 23))
    prediction[0, 0, 4, 4] = value
    task = make_task(kind, kind, CHANNELS[kind])
    valid[0, 4, 4] = False
    assert all(map(math.isfinite, measure(task, (prediction, target, valid)).values()))
    valid[0, 4, 4] = True
    assert all(map(math.isnan, measure(task, (prediction, target, valid)).values()))


@pytest.mark.parametrize("kind", PIXEL_KINDS)
@pytest.mark.parametrize("resolution", ["prediction", "full"])
def test_bfloat16_predictions_of_graphs(kind, resolution):
    prediction, target, valid = make_batch(kind)
    task = make_task(kind, kind, CHANNELS[kind], resolution=resolution)
    low = prediction.bfloat16().requires_grad_()
    found = measure(task, (low, target, valid))
    assert found == pytest.approx(measure(task, (low.float(), target, valid)))


def test_full_resolution_upsamples_bilinearly():
    prediction, target, valid = make_batch("depth")
    task = make_task("d", "depth", 1, resolution="full")
    up = F.interpolate(prediction, target.shape[-2:], mode="bilinear", align_corners=True)
    assert measure(task, (prediction, target, valid)) == measure(task, (up, target, valid))
    # The loss and the metric then see the same values.
    assert float(task.loss(prediction, target, valid)) == pytest.approx(
        measure(task, (prediction, target, valid))["abs_err"], rel=1e-5
    )


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_ranks_are_joined(kind):
    task = make_task(kind, kind, CHANNELS[kind])
    first, second = make_batch(kind, seed=1), make_batch(kind, shape=(1, 17, 23), seed=2)
    here, there = task.metrics(), task.metrics()
    here.update(*first)
    there.update(*second)
    others = iter([there.metric_state[name] for name in here.metric_state])
    here.sync(
        dist_sync_fn=lambda tensor, group=None: [tensor, next(others)],
        distributed_available=lambda: True,
    )
    here._to_sync = False  # torchmetrics joins once; compute() would try again
    assert here.compute() == pytest.approx(measure(task, first, second), rel=1e-12)


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_reset_copy_and_pickle(kind):
    task = make_task(kind, kind, CHANNELS[kind])
    metrics = task.metrics()
    metrics.update(*make_batch(kind, seed=1))
    expected = metrics.compute()
    assert copy.deepcopy(metrics).compute() == expected
    assert pickle.loads(pickle.dumps(metrics)).compute() == expected
    metrics.reset()
    metrics.update(*make_batch(kind, seed=2))
    assert metrics.compute() == measure(task, make_batch(kind, seed=2))


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_memory_does_not_grow(kind):
    metrics = make_task(kind, kind, CHANNELS[kind]).metrics()
    sizes = set()
    for seed in range(3):
        metrics.update(*make_batch(kind, seed=seed))
        sizes.add(sum(state.numel() for state in metrics.metric_state.values()))
    assert len(sizes) == 1


def test_bad_shapes_reach_metrics_too():
    with pytest.raises(ValueError, match="mine: Expected prediction of shape"):
        make_task("mine", "depth", 1).metrics().update(
            torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4), all_valid(1, 4, 4)
        )
