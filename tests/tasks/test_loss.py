"""Losses: values against plain formulas, masks, sizes, dtypes and bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparsemtl.tasks import make_task
from sparsemtl.tasks.resize import resize_bilinear, resize_nearest
from tests.tasks.batches import CHANNELS, PIXEL_KINDS, make_batch


def reference(kind, prediction, target, valid):
    """The formula over a Python-indexed list of pixels, in float64."""
    size = prediction.shape[-2:]
    valid = F.interpolate(valid[:, None].double(), size, mode="nearest-exact")[:, 0].bool()
    prediction = prediction.double().permute(0, 2, 3, 1)[valid]
    if kind == "segmentation":
        labels = F.interpolate(target[:, None].double(), size, mode="nearest-exact")[:, 0].long()[
            valid
        ]
        return -F.log_softmax(prediction, 1)[torch.arange(len(labels)), labels].mean()
    target = F.interpolate(target.double(), size, mode="nearest-exact").permute(0, 2, 3, 1)[valid]
    if kind == "normals":
        return 1 - F.cosine_similarity(prediction, target, dim=1).mean()
    return (prediction - target).abs().mean()


@pytest.mark.parametrize("kind", PIXEL_KINDS)
@pytest.mark.parametrize("small", [(5, 6), (17, 23), (1, 1), (20, 31)])
def test_loss_is_the_mean_over_valid_pixels_at_the_predictions_size(kind, small):
    prediction, target, valid = make_batch(kind, small=small, seed=3)
    prediction.requires_grad_()
    loss = make_task(kind, kind, CHANNELS[kind]).loss(prediction, target, valid)
    wide = prediction.detach().double().requires_grad_()
    expected = reference(kind, wide, target, valid)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(prediction.grad, wide.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_full_resolution_upsamples_the_prediction(kind):
    prediction, target, valid = make_batch(kind)
    full = make_task(kind, kind, CHANNELS[kind], resolution="full")
    up = F.interpolate(prediction, target.shape[-2:], mode="bilinear", align_corners=True)
    torch.testing.assert_close(
        full.loss(prediction, target, valid),
        reference(kind, up, target, valid).float(),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", PIXEL_KINDS)
@pytest.mark.parametrize("resolution", ["prediction", "full"])
def test_no_valid_pixel_gives_zero_and_a_zero_gradient(kind, resolution):
    prediction, target, valid = make_batch(kind)
    prediction.requires_grad_()
    task = make_task(kind, kind, CHANNELS[kind], resolution=resolution)
    loss = task.loss(prediction, target, torch.zeros_like(valid))
    assert loss.detach() == 0.0
    loss.backward()
    assert (prediction.grad == 0).all()


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_invalid_pixels_have_no_influence(kind):
    prediction, target, valid = make_batch(kind, small=(17, 23))
    task = make_task(kind, kind, CHANNELS[kind])
    expected = task.loss(prediction, target, valid)
    target, dirty = target.clone(), prediction.clone()
    if kind == "segmentation":
        target[~valid] = 255
    else:
        target.permute(0, 2, 3, 1)[~valid] = float("nan")
    dirty.permute(0, 2, 3, 1)[~valid] = float("inf")
    dirty.requires_grad_()
    loss = task.loss(dirty, target, valid)
    assert torch.equal(loss, expected)
    loss.backward()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad.permute(0, 2, 3, 1)[~valid] == 0).all()


@pytest.mark.parametrize("kind", PIXEL_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_reduced_precision_is_computed_in_float32(kind, dtype):
    prediction, target, valid = make_batch(kind)
    prediction = prediction.to(dtype)
    loss = make_task(kind, kind, CHANNELS[kind]).loss(prediction, target, valid)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference(kind, prediction, target, valid).to(loss.dtype)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_compiles_in_one_graph(kind):
    prediction, target, valid = make_batch(kind)
    task = make_task(kind, kind, CHANNELS[kind])
    compiled = torch.compile(task.loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(prediction, target, valid), task.loss(prediction, target, valid)
    )


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_an_empty_batch_is_no_valid_pixel(kind):
    prediction, target, valid = make_batch(kind, shape=(0, 8, 8))
    assert make_task(kind, kind, CHANNELS[kind]).loss(prediction, target, valid) == 0


def test_any_integer_labels():
    prediction, target, valid = make_batch("segmentation")
    task = make_task("s", "segmentation", 5)
    expected = task.loss(prediction, target, valid)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(task.loss(prediction, target.to(dtype), valid), expected)


def test_class_weights_follow_torch():
    prediction, target, valid = make_batch("segmentation", small=(17, 23))
    weights = (0.5, 9.0, 0.0, 1.0, 2.0)
    task = make_task("s", "segmentation", 5, class_weights=weights)
    expected = F.cross_entropy(
        prediction, torch.where(valid, target, 255), torch.tensor(weights), ignore_index=255
    )
    torch.testing.assert_close(task.loss(prediction, target, valid), expected)
    only_zero = torch.full_like(target, 2)
    assert task.loss(prediction, only_zero, valid) == 0.0


def test_normals_are_normalised_on_both_sides():
    prediction, target, valid = make_batch("normals")
    task = make_task("n", "normals", 3)
    torch.testing.assert_close(
        task.loss(prediction * 100, target * 0.5, valid), task.loss(prediction, target, valid)
    )


def test_a_zero_vector_has_a_bounded_gradient():
    _, target, valid = make_batch("normals", small=(17, 23))
    prediction = torch.zeros(2, 3, 17, 23, requires_grad=True)
    loss = make_task("n", "normals", 3).loss(prediction, target, valid)
    assert loss.detach() == 1.0
    loss.backward()
    assert prediction.grad.abs().max() < 1e5


@pytest.mark.parametrize(
    ("before", "after"), [((17, 23), (3, 4)), ((321, 321), (41, 41)), ((3, 5), (7, 31))]
)
def test_nearest_is_torchs(before, after):
    x = torch.randn(2, 3, *before)
    for rule in ("nearest", "nearest-exact"):
        assert torch.equal(resize_nearest(x, after, rule), F.interpolate(x, after, mode=rule))
    flags = x[:, 0] > 0
    assert resize_nearest(flags, after).dtype == torch.bool


def test_same_size_is_left_alone():
    x = torch.randn(1, 2, 4, 4)
    assert resize_nearest(x, (4, 4)) is x
    assert resize_bilinear(x, (4, 4)) is x


BAD = {  # kind, prediction, target, valid, error, text
    "channels": (
        "depth",
        (2, 3, 4, 4),
        (2, 1, 8, 8),
        (2, 8, 8),
        r"\[B, 1, h, w\], got \[2, 3, 4, 4\]",
    ),
    "rank": ("depth", (2, 1, 4), (2, 1, 8, 8), (2, 8, 8), "prediction of shape"),
    "flat-target": ("depth", (2, 1, 4, 4), (2, 8, 8), (2, 8, 8), r"target of shape \[B, 1, H, W\]"),
    "batch": ("depth", (2, 1, 4, 4), (3, 1, 8, 8), (3, 8, 8), "batch size 2, got 3"),
    "valid": ("depth", (2, 1, 4, 4), (2, 1, 8, 8), (2, 4, 4), r"valid of shape \[2, 8, 8\]"),
    "normals": ("normals", (2, 3, 4, 4), (2, 1, 8, 8), (2, 8, 8), r"\[B, 3, H, W\]"),
    "no-pixel": ("depth", (2, 1, 0, 4), (2, 1, 8, 8), (2, 8, 8), "at least one pixel"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_shapes_get_a_clear_error(case):
    kind, prediction, target, valid, text = case
    task = make_task("mine", kind, CHANNELS[kind])
    with pytest.raises(ValueError, match=f"mine: Expected .*{text}"):
        task.loss(torch.zeros(prediction), torch.zeros(target), torch.ones(valid, dtype=torch.bool))


def test_bad_dtypes_get_a_clear_error():
    prediction, target, valid = make_batch("segmentation")
    task = make_task("mine", "segmentation", 5)
    with pytest.raises(TypeError, match="mine: Expected target of an integer dtype"):
        task.loss(prediction, target.float(), valid)
    with pytest.raises(TypeError, match="mine: Expected valid of dtype"):
        task.loss(prediction, target, valid.float())
    with pytest.raises(TypeError, match="mine: Expected prediction of a floating-point"):
        task.loss(prediction.long(), target, valid)


@pytest.mark.parametrize("label", [-1, 5, 255])
def test_labels_out_of_range_are_named(label):
    prediction, target, valid = make_batch("segmentation")
    target[0, 3, 3] = label
    valid[0, 3, 3] = True
    task = make_task("mine", "segmentation", 5)
    text = rf"mine: Expected valid labels in 0\.\.4, got {label} \(1 such"
    with pytest.raises(ValueError, match=text):
        task.loss(prediction, target, valid)
    with pytest.raises(ValueError, match=text):
        task.metrics().update(prediction, target, valid)
    valid[0, 3, 3] = False
    task.loss(prediction, target, valid)


def test_a_byte_label_beyond_many_classes():
    task = make_task("mine", "segmentation", 300)
    target = torch.full((1, 2, 2), 255, dtype=torch.uint8)
    task.loss(torch.zeros(1, 300, 2, 2), target, torch.ones(1, 2, 2, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["normals", "depth", "keypoints"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_targets_that_are_not_finite_are_named(kind, value):
    prediction, target, valid = make_batch(kind)
    target[0, 0, 2, 2] = value
    valid[0, 2, 2] = True
    with pytest.raises(ValueError, match="mine: Expected finite valid"):
        make_task("mine", kind, CHANNELS[kind]).loss(prediction, target, valid)


def test_negative_depth_is_named():
    prediction, target, valid = make_batch("depth")
    target[0, 0, 2, 2] = -1.5
    valid[0, 2, 2] = True
    with pytest.raises(ValueError, match=r"Expected valid depths ≥ 0, got -1.5"):
        make_task("d", "depth", 1).loss(prediction, target, valid)


def test_normals_of_the_other_space_are_refused():
    prediction, target, valid = make_batch("normals")
    encoded = (target + 1) * 127.5
    with pytest.raises(ValueError, match="looks encoded"):
        make_task("n", "normals", 3).loss(prediction, encoded, valid)
    with pytest.raises(ValueError, match="components ≥ 0"):
        make_task("n", "normals", 3, normals_space="encoded").loss(prediction, target, valid)
    make_task("n", "normals", 3, normals_space="encoded").loss(prediction, encoded, valid)


BAD_TASKS = {
    "kind": (("t", "segmentatoin", 3), {}, ValueError, "Did you mean 'segmentation'"),
    "option": (("t", "depth", 1), {"pool": 1}, TypeError, "option of depth"),
    "one-class": (("t", "segmentation", 1), {}, ValueError, "≥ 2 classes, got 1"),
    "normals": (("t", "normals", 2), {}, ValueError, "channels = 3, got 2"),
    "depth": (("t", "depth", 40), {}, ValueError, "channels = 1, got 40"),
    "resolution": (("t", "depth", 1), {"resolution": "half"}, ValueError, "resolution"),
    "miou": (("t", "segmentation", 3), {"miou_convention": "x"}, ValueError, "miou_convention"),
    "pooling": (("t", "edges", 1), {"pooling": "x"}, ValueError, r"pooling .*'batches'"),
    "delta": (("t", "depth", 1), {"delta_rule": "x"}, ValueError, "delta_rule"),
    "space": (("t", "normals", 3), {"normals_space": "x"}, ValueError, "normals_space"),
    "constant": (("t", "depth", 1), {"constant": "x"}, ValueError, "constant"),
    "weights": (("t", "segmentation", 3), {"class_weights": (1.0,)}, ValueError, "3 numbers"),
    "nan-weight": (
        ("t", "segmentation", 2),
        {"class_weights": (1.0, float("nan"))},
        ValueError,
        "2 numbers",
    ),
}


@pytest.mark.parametrize("case", BAD_TASKS.values(), ids=BAD_TASKS.keys())
def test_bad_tasks_get_a_clear_error(case):
    arguments, options, error, text = case
    with pytest.raises(error, match=text):
        make_task(*arguments, **options)


def test_the_released_rule_rounds_indices_down():
    target = torch.arange(64.0).reshape(1, 1, 8, 8) + 1.0
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    prediction = torch.zeros(1, 1, 2, 2)
    released = make_task("d", "depth", 1, resolution="released")
    assert released.loss(prediction, target, valid) == target[0, 0, ::4, ::4].mean()
    centred = make_task("d", "depth", 1)
    assert centred.loss(prediction, target, valid) == target[0, 0, 2::4, 2::4].mean()
