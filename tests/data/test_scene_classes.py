"""Classes of scenes: exact to the room, mirrored where they must be, there only if asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsemtl.data import ScenesConfig, as_multitask, build_dataset
from sparsemtl.data.base import DataError, DataSpec, TargetSpec
from sparsemtl.data.scene_classes import (
    COLOURS,
    POSES,
    camera_pose,
    colour_name,
    mirrored_pose,
)
from sparsemtl.data.scenes import CLASSIFICATION, DENSE, render, room_of

CONFIG = ScenesConfig(height=48, width=64, frames_train=24)


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((0.5, 0.5, 0.52), "neutral"),
        ((0.9, 0.1, 0.1), "red"),
        ((0.9, 0.1, 0.2), "red"),  # hue 0.98: red on the other side of 0
        ((0.9, 0.5, 0.1), "orange"),
        ((0.8, 0.8, 0.1), "yellow"),
        ((0.1, 0.8, 0.2), "green"),
        ((0.1, 0.8, 0.8), "cyan"),
        ((0.1, 0.2, 0.9), "blue"),
        ((0.5, 0.1, 0.9), "purple"),
        ((0.9, 0.1, 0.7), "pink"),
    ],
)
def test_colours_have_names(colour, name):
    assert COLOURS[colour_name(colour)] == name


def test_a_pose_is_where_the_camera_looks_and_mirrors():
    for index in range(24):
        room = room_of(CONFIG, "train", index)
        forward = room.camera.axes[1]
        name = POSES[camera_pose(room)]
        turn = np.degrees(np.arctan2(forward[0], forward[1]))
        side = "left" if turn < -9 else "right" if turn > 9 else "ahead"
        assert name.startswith(side)
        assert name.endswith("level") == (np.degrees(np.arcsin(forward[2])) >= -13)
    assert [POSES[mirrored_pose(p)] for p in (0, 1, 2, 5)] == [
        *("right down", "right level", "ahead down", "left level"),
    ]


def test_room_types_follow_from_the_labels_of_the_picture():
    for index in range(24):
        frame = render(CONFIG, "train", index)
        names = ("bed", "sofa")
        seen = [bool((frame.segmentation == label).mean() >= 0.004) for label in (0, 8)]
        kind = int(frame.room_type[0, 0])
        assert (kind == 0) == seen[0], names
        assert (kind == 1) == (seen[1] and not seen[0])


def test_targets_are_single_labels_and_the_mirror_turns_the_pose():
    data = build_dataset(CONFIG, "train", CLASSIFICATION)
    plain = build_dataset(ScenesConfig(**{**vars(CONFIG), "flip": False}), "train", CLASSIFICATION)
    turned = 0
    for index in range(24):
        sample, straight = data.sample(index), plain.sample(index)
        mirrored = not torch.equal(sample.image, straight.image)
        for task, target in sample.targets.items():
            assert target.shape == sample.valid[task].shape == (1, 1)
            assert target.dtype == torch.int64
            assert 0 <= int(target) < data.spec.targets[task].channels
            expected = int(straight.targets[task])
            if task == "camera_pose" and mirrored:
                expected = mirrored_pose(expected)
                turned += 1
            assert int(target) == expected
    assert turned > 3


def test_every_target_means_the_dense_ones():
    assert tuple(build_dataset(CONFIG, "train").spec.targets) == DENSE
    mixed = build_dataset(CONFIG, "train", ["depth", "room_type"]).sample(0)
    assert mixed.targets["depth"].shape == (1, 48, 64)
    assert mixed.targets["room_type"].shape == (1, 1)


def test_a_data_set_of_ones_own_may_have_many_classes():
    spec = DataSpec("own", {"id": TargetSpec("classification", 400)}, (8, 8))
    items = [{"image": torch.zeros(3, 8, 8), "id": label} for label in (0, 255, 399)]
    data = as_multitask(items, spec)
    assert [int(data[i].targets["id"]) for i in range(3)] == [0, 255, 399]
    assert all(bool(data[i].valid["id"]) for i in range(3))
    unknown = as_multitask([{"image": torch.zeros(3, 8, 8), "id": -1}], spec)
    assert not bool(unknown[0].valid["id"])
    beyond = as_multitask([{"image": torch.zeros(3, 8, 8), "id": 400}], spec)
    with pytest.raises(DataError, match=r"id labels in 0\.\.399"):
        beyond[0]
