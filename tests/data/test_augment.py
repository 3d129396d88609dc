"""Views of a frame: image, labels, depth and normals must tell of the same scene afterwards."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemtl.data.augment import (
    RawFrame,
    View,
    apply_view,
    central_view,
    draw_view,
    resized_view,
)
from sparsemtl.data.image import CAFFE_BGR_MEAN, normalise
from sparsemtl.data.nyuv2_files import Layer


def make_frame(height=12, width=16, space="decoded"):
    """The image's red is the column and green the row; each label names its own pixel."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack((columns, rows, rows * 0 + 7), axis=2).astype(np.uint8)
    mask = (rows + columns) % 5 != 0
    normals = np.random.default_rng(0).normal(size=(height, width, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    if space == "encoded":
        normals = np.rint((normals + 1) * 127).astype(np.float32)
    depth = (1.0 + rows + columns / 10).astype(np.float32)
    everywhere = np.ones_like(mask)
    return RawFrame(
        image,
        {
            "segmentation": Layer((rows * width + columns) * mask, mask),
            "normals": Layer(normals * mask[..., None], mask),
            "depth": Layer(depth, everywhere),
        },
    )


def apply(frame, view, *, space="decoded", as_published=False, normalisation="unit"):
    return apply_view(frame, view, normalisation, space, as_published=as_published)


def test_the_whole_frame_is_left_as_it_is():
    frame = make_frame()
    image, targets, valid = apply(frame, resized_view(frame.size))
    assert torch.equal(image * 255, torch.from_numpy(frame.image).permute(2, 0, 1).float())
    for task, layer in frame.layers.items():
        values = torch.from_numpy(layer.values)
        values = values.permute(2, 0, 1) if values.dim() == 3 else values
        assert torch.equal(targets[task].reshape(values.shape), values)
        assert torch.equal(valid[task], torch.from_numpy(layer.valid))


@pytest.mark.parametrize("space", ["decoded", "encoded"])
def test_a_flip_mirrors_and_turns_x(space):
    frame = make_frame(space=space)
    plain = apply(frame, View(frame.size, 1.0, False, (2, 3), (6, 7)), space=space)
    start = (2, 16 - 7 - 3)
    there = apply(frame, View(frame.size, 1.0, True, (2, 3), (6, 7)), space=space)
    assert start != (2, 3)
    assert torch.equal(there[0], plain[0].flip(-1))
    for task in ("segmentation", "depth"):
        assert torch.equal(there[1][task], plain[1][task].flip(-1))
    expected, mask = plain[1]["normals"].flip(-1), plain[2]["normals"].flip(-1)
    assert torch.equal(there[2]["normals"], mask)
    if space == "decoded":
        expected[0] = -expected[0]
    else:
        expected[2] = (255.0 - expected[2]) * mask
    assert torch.equal(there[1]["normals"], expected)


def test_as_published_leaves_normals_and_depth_alone():
    frame = make_frame()
    view = View((24, 32), 2.0, True, (0, 0), (24, 32))
    _, right, _ = apply(frame, view)
    _, published, _ = apply(frame, view, as_published=True)
    assert torch.equal(published["depth"], right["depth"] * 2)
    valid = right["normals"].abs().sum(0) > 0
    assert torch.allclose(published["normals"][0][valid], -right["normals"][0][valid])
    assert torch.equal(published["normals"][1:], right["normals"][1:])


@pytest.mark.parametrize("zoom", [0.5, 0.73, 1.0, 1.5])
def test_labels_show_the_pixel_that_the_image_shows(zoom):
    frame = make_frame(40, 60)
    size = (round(40 * zoom), round(60 * zoom))
    image, targets, valid = apply(frame, View(size, zoom, False, (0, 0), size))
    label, mask = targets["segmentation"], valid["segmentation"]
    # The picture holds its own coordinates, so its colours say where each pixel comes from.
    column, row = image[0] * 255, image[1] * 255
    inner = mask.clone()
    inner[[0, -1]] = inner[:, [0, -1]] = False
    slack = 0.5 + 1e-3
    assert ((label % 60 - column)[inner].abs() <= slack).all()
    assert ((label // 60 - row)[inner].abs() <= slack).all()


def test_a_zoom_divides_depth_and_keeps_normals_unit():
    frame = make_frame()
    view = View((18, 24), 1.5, False, (0, 0), (18, 24))
    _, targets, valid = apply(frame, view)
    source = frame.layers["depth"].values
    rows, columns = (np.arange(18) + 0.5) * 12 // 18, (np.arange(24) + 0.5) * 16 // 24
    expected = source[np.ix_(rows.astype(int), columns.astype(int))] / np.float32(1.5)
    assert np.allclose(targets["depth"][0].numpy(), expected)
    length = targets["normals"].norm(dim=0)[valid["normals"]]
    assert torch.allclose(length, torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("as_published", [False, True])
def test_padding_is_centred_invalid_and_as_documented(as_published):
    frame = make_frame(5, 6)
    image, targets, valid = apply(
        frame, central_view((5, 6), (8, 9)), as_published=as_published, normalisation="caffe_bgr"
    )
    inside = torch.zeros(8, 9, dtype=torch.bool)
    inside[1:6, 1:7] = True
    for task in targets:
        assert not valid[task][~inside].any()
        assert (targets[task][..., ~inside] == 0).all()
    assert torch.equal(valid["depth"], inside)
    value = -torch.tensor(CAFFE_BGR_MEAN)[:, None] if as_published else torch.zeros(3, 1)
    assert torch.equal(image[:, ~inside], value.expand(3, int((~inside).sum())))
    picture = torch.from_numpy(frame.image).permute(2, 0, 1)
    assert torch.equal(image[:, 1:6, 1:7], normalise(picture, "caffe_bgr"))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    window=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_any_view_fits_its_window(seed, size, window):
    view = draw_view(np.random.default_rng(seed), size, window, (0.5, 1.5))
    for start, have, want in zip(view.start, view.resized, window, strict=True):
        if have >= want:
            assert 0 <= start <= have - want
        else:
            assert start == -((want - have) // 2)
    image, targets, valid = apply(make_frame(*size), view)
    assert image.shape == (3, *window)
    assert torch.isfinite(image).all()
    for task, target in targets.items():
        assert target.shape[-2:] == window
        assert valid[task].shape == window
        assert (target[..., ~valid[task]] == 0).all()
    if view.resized[0] >= window[0] and view.resized[1] >= window[1]:
        assert valid["depth"].all()


def test_every_position_and_both_sides_are_drawn():
    views = [draw_view(np.random.default_rng(i), (10, 10), (8, 8), (1.0, 1.0)) for i in range(400)]
    assert {view.start for view in views} == {(y, x) for y in range(3) for x in range(3)}
    assert 150 < sum(view.mirrored for view in views) < 250
