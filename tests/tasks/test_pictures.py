"""Pictures of targets and predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsemtl.tasks import make_task
from sparsemtl.tasks.pictures import INVALID, palette
from tests.tasks.batches import CHANNELS, PIXEL_KINDS, make_batch


@pytest.mark.parametrize("kind", PIXEL_KINDS)
def test_target_and_prediction_become_pictures(kind):
    task = make_task(kind, kind, CHANNELS[kind])
    prediction, target, valid = make_batch(kind)
    picture = task.to_picture(target[0], valid[0])
    assert picture.shape == (17, 23, 3)
    assert picture.dtype == np.uint8
    assert (picture[~valid[0].numpy()] == INVALID).all()
    low = prediction[0].bfloat16().requires_grad_()
    assert task.to_picture(low).shape == (5, 6, 3)


@pytest.mark.parametrize("classes", [2, 13, 19, 40])
def test_classes_have_distinct_colours(classes):
    colours = palette(classes)
    assert len({tuple(c) for c in colours}) == classes
    assert not (colours == INVALID).all(1).any()
    gaps = np.abs(colours[:, None].astype(int) - colours[None]).sum(-1)
    assert gaps[~np.eye(classes, dtype=bool)].min() > 15
    assert (palette(40)[:classes] == colours).all()


def test_labels_and_scores_agree():
    task = make_task("s", "segmentation", 5)
    labels = torch.arange(5).view(1, 5)
    scores = torch.nn.functional.one_hot(labels, 5).permute(2, 0, 1).float()
    assert (task.to_picture(labels) == task.to_picture(scores)).all()
    assert (task.to_picture(torch.tensor([[255, -1]])) == INVALID).all()


def test_normals_are_shifted_or_not():
    up = torch.tensor([0.0, 0.0, 4.0]).view(3, 1, 1)
    decoded, encoded = (
        make_task("n", "normals", 3, normals_space=s).to_picture(up)[0, 0].tolist()
        for s in ("decoded", "encoded")
    )
    assert decoded == [128, 128, 255]
    assert encoded == [0, 0, 255]


def test_limits_make_pictures_comparable():
    task = make_task("d", "depth", 1)
    near, far = torch.full((1, 1, 1), 1.0), torch.full((1, 1, 1), 9.0)
    assert (task.to_picture(near) == task.to_picture(far)).all()
    low, high = (task.to_picture(t, limits=(1.0, 9.0))[0, 0] for t in (near, far))
    assert low.sum() < high.sum()
    beyond = task.to_picture(torch.full((1, 1, 1), 99.0), limits=(1.0, 9.0))
    assert (beyond == task.to_picture(far, limits=(1.0, 9.0))).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_grey(value):
    depth = torch.tensor([[[1.0, value, 3.0]]])
    assert (make_task("d", "depth", 1).to_picture(depth)[0, 1] == INVALID).all()
    assert (make_task("d", "depth", 1).to_picture(torch.full((1, 2, 2), value)) == INVALID).all()


def test_bad_pictures():
    with pytest.raises(ValueError, match=r"mine: Expected .*\[3, H, W\], got \[1, 2, 2\]"):
        make_task("mine", "normals", 3).to_picture(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"integer labels \[H, W\]"):
        make_task("mine", "segmentation", 3).to_picture(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"valid of shape \[2, 2\]"):
        make_task("mine", "depth", 1).to_picture(
            torch.zeros(1, 2, 2), torch.ones(3, 3, dtype=torch.bool)
        )
