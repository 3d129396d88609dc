"""Specs, batches, the registry and a user's own dataset."""

import numpy as np
import pytest
import torch

from sparsemtl.data import (
    DATASETS,
    DataError,
    DataSpec,
    MultitaskSample,
    Scenes,
    ScenesConfig,
    TargetSpec,
    as_multitask,
    build_dataset,
    collate,
    count_frames,
    dataset_config,
)
from sparsemtl.data.image import NORMALISATIONS, denormalise, normalise

SPEC = DataSpec(
    "mine",
    {
        "parts": TargetSpec("segmentation", 4),
        "shape": TargetSpec("normals", 3),
        "range": TargetSpec("depth", 1),
        "border": TargetSpec("edges", 1),
    },
    (6, 8),
)


class Mine:
    """Six by eight pixels of a user's own, as numpy arrays and tensors."""

    def __init__(self, **changes):
        self.changes = changes

    def __len__(self):
        return 3

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        item = {
            "image": rng.random((3, 6, 8)),
            "parts": torch.from_numpy(rng.integers(0, 4, (6, 8))),
            "shape": np.concatenate([np.zeros((3, 1, 8)), np.ones((3, 5, 8))], axis=1),
            "range": rng.random((6, 8)).astype(np.float32),
            "border": rng.random((1, 6, 8)),
        }
        item["parts"][0, 0] = 255
        item["range"][1, 1] = 0.0
        return {**item, **self.changes}


def test_a_users_own_data_is_wrapped():
    dataset = as_multitask(Mine(), SPEC)
    sample = dataset[1]
    assert len(dataset) == 3
    assert sample.index == 1
    assert sample.image.dtype == torch.float32
    assert not sample.valid["parts"][0, 0]
    assert sample.targets["parts"][0, 0] == 0
    assert not sample.valid["shape"][0].any()
    assert sample.valid["shape"][1:].all()
    assert sample.targets["range"].shape == (1, 6, 8)
    assert not sample.valid["range"][1, 1]
    assert sample.valid["border"].all()
    batch = collate([dataset.sample(i, 3) for i in range(3)])
    assert batch.image.shape == (3, 3, 6, 8)
    assert batch.index.tolist() == [0, 1, 2]


def test_a_users_masks_are_kept():
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:4] = True
    values = np.where(mask, 0.5, np.nan)
    sample = as_multitask(Mine(border=values, valid={"border": mask}), SPEC)[0]
    assert torch.equal(sample.valid["border"], torch.from_numpy(mask))
    assert (sample.targets["border"][0][~torch.from_numpy(mask)] == 0).all()


def test_our_samples_pass_through_and_epochs_are_handed_on():
    config = ScenesConfig(height=12, width=16, frames_train=4)
    inner = Scenes(config, "train")
    spec = DataSpec("rooms", {"depth": inner.spec.targets["depth"]}, (12, 16))
    dataset = as_multitask(inner, spec)
    for epoch in range(4):
        assert torch.equal(dataset.sample(2, epoch).image, inner.sample(2, epoch).image)
    assert list(dataset[0].targets) == ["depth"]


NAN = np.full((6, 8), np.nan)
WRONG = {
    "image-hwc": ({"image": np.zeros((6, 8, 3))}, r"image \[3, H, W\]"),
    "image-bytes": ({"image": np.zeros((3, 6, 8), np.uint8)}, "floating point image"),
    "image-nan": ({"image": np.full((3, 6, 8), np.nan)}, "in image, got 144 NaN"),
    "image-text": ({"image": "cat.png"}, "image as a tensor"),
    "label-4": ({"parts": torch.full((6, 8), 4)}, r"parts labels in 0\.\.3, got \[4\] in 48"),
    "label-negative": ({"parts": torch.full((6, 8), -1)}, r"parts labels in 0\.\.3, got \[-1\]"),
    "label-float": ({"parts": torch.zeros(6, 8)}, "whole labels in parts"),
    "label-size": ({"parts": torch.zeros(3, 8, dtype=torch.int64)}, r"parts \[6, 8\]"),
    "normals-two": ({"shape": np.ones((2, 6, 8))}, r"shape \[3, 6, 8\]"),
    "depth-nan": ({"range": NAN}, "in range, got 48 NaN"),
    "mask-float": ({"valid": {"range": np.ones((6, 8))}}, "valid mask of range"),
    "mask-size": ({"valid": {"range": np.ones((5, 8), bool)}}, "valid mask of range"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_sample_is_named(case):
    changes, words = case
    with pytest.raises(DataError, match=rf"mine\[2\]: Expected .*{words}"):
        as_multitask(Mine(**changes), SPEC)[2]


def test_wrong_datasets_are_refused():
    class Pairs(Mine):
        def __getitem__(self, index):
            return (torch.zeros(3, 6, 8), 1)

    class Poor(Mine):
        def __getitem__(self, index):
            return {"image": torch.zeros(3, 6, 8)}

    class Empty(Mine):
        def __len__(self):
            return 0

    with pytest.raises(DataError, match=r"a dict with 'image'.*got tuple"):
        as_multitask(Pairs(), SPEC)[0]
    with pytest.raises(DataError, match=r"keys.*'parts'.*got only"):
        as_multitask(Poor(), SPEC)[0]
    with pytest.raises(DataError, match="at least one sample"):
        as_multitask(Empty(), SPEC)
    with pytest.raises(TypeError, match="__len__"):
        as_multitask(iter([]), SPEC)


def test_specs_are_checked():
    for fields, words in (
        (("pose", 1), "kind"),
        (("segmentation", 0), "channels >= 1"),
        (("depth", 2), "channels = 1 for depth"),
        (("normals", 1), "channels = 3"),
        (("segmentation", 2, ("a",)), "2 class_names, got 1"),
        (("normals", 3, (), "raw"), "normals_space"),
    ):
        with pytest.raises(ValueError, match=f"TargetSpec: Expected .*{words}"):
            TargetSpec(*fields)
    with pytest.raises(ValueError, match="at least one target"):
        DataSpec("none", {}, (1, 1))
    with pytest.raises(ValueError, match="image_size"):
        DataSpec("flat", SPEC.targets, (0, 4))


def test_batches_must_agree():
    config = ScenesConfig(height=12, width=16)
    first, second = Scenes(config, "train")[0], Scenes(config, "train", ["depth"])[1]
    with pytest.raises(DataError, match=r"tasks .* in every sample"):
        collate([first, second])
    small = Scenes(ScenesConfig(height=10, width=16), "train")[0]
    with pytest.raises(DataError, match="image of one shape"):
        collate([first, small])
    with pytest.raises(DataError, match="at least one sample"):
        collate([])


def test_the_registry_builds_and_lists_its_choices():
    assert set(DATASETS) == {"scenes", "nyuv2", "vehiclex"}
    assert dataset_config("scenes") is ScenesConfig
    with pytest.raises(ValueError, match=r"scenes.*nyuv2.*'nyuv3'.*mean 'nyuv2'"):
        dataset_config("nyuv3")
    config = ScenesConfig(height=8, width=8, frames_train=5, frames_val=0, frames_test=2)
    assert count_frames(config) == {"train": 5, "val": 0, "test": 2}
    assert len(build_dataset(config, "test", ["depth"])) == 2
    with pytest.raises(TypeError, match=r"ScenesConfig.*got dict"):
        build_dataset({"name": "scenes"}, "train")
    with pytest.raises(TypeError, match="as a list of names"):
        build_dataset(config, "train", "depth")
    for tasks, words in (([], "at least one task"), (["depth", "depth"], "each task once")):
        with pytest.raises(ValueError, match=words):
            build_dataset(config, "train", tasks)


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisations_invert(name):
    picture = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    assert torch.allclose(denormalise(normalise(picture, name), name), picture / 255.0, atol=1e-6)


def test_a_sample_is_a_named_tuple():
    sample = MultitaskSample(torch.zeros(3, 2, 2), {}, {}, 4)
    assert sample.index == 4
    assert sample._fields == ("image", "targets", "valid", "index")
