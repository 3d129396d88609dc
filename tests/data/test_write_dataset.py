"""Written rooms come back as they were; an interrupted write goes on; nobody's files are lost."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sparsemtl.data import (
    DataError,
    NYUv2,
    NYUv2Config,
    Scenes,
    ScenesConfig,
    check_dataset,
    write_dataset,
)
from sparsemtl.data.scenes import render
from sparsemtl.data.write import MANIFEST, encode_normals

# The config of the `written` fixture.
SMALL = ScenesConfig(height=48, width=64, frames_train=4, frames_val=2, frames_test=2)
PLAIN = dataclasses.replace(SMALL, flip=False, image_normalisation="unit")
HALF_A_CODE = 0.5 / 127.5


@pytest.mark.parametrize("layout", ["nyuv2", "mtan"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_round_trip(written, layout, split):
    config = NYUv2Config(
        root=str(written[layout]),
        augmentation="none",
        crop=(SMALL.height, SMALL.width),
        val_fraction=0.0,
        image_normalisation="unit",
    )
    found, rooms = NYUv2(config, split), Scenes(PLAIN, split)
    assert len(found) == len(rooms)
    for index in range(len(rooms)):
        a, b = found[index], rooms[index]
        assert all(mask.all() for mask in a.valid.values())
        assert torch.allclose(a.image, b.image, atol=1e-6)
        assert torch.equal(a.targets["segmentation"], b.targets["segmentation"])
        assert torch.equal(a.targets["depth"], b.targets["depth"])
        # Rounding moves each component by half a code, the clamp at 254 by one more.
        slack = 4 * HALF_A_CODE if layout == "nyuv2" else 1e-6
        assert (a.targets["normals"] - b.targets["normals"]).abs().max() <= slack


def test_the_nyuv2_layout_is_the_published_one(written):
    root = written["nyuv2"]
    lists = json.loads((root / "nyu_v2_3task.json").read_text())
    assert list(lists) == ["train", "train1", "train2", "test"]
    assert [len(frames) for frames in lists.values()] == [4, 2, 2, 2]
    assert lists["train"][0] == [
        "img/0000.png",
        "seg/0000.png",
        "normal_mask/0000.png",
        "depth/0000.npy",
    ]
    assert sorted(lists["train1"] + lists["train2"]) == lists["train"]
    for entry in lists["train"] + lists["test"]:
        image, seg, normal, depth = (root / path for path in entry)
        for path, mode, limit in ((image, "RGB", 256), (seg, "L", 40), (normal, "RGB", 255)):
            with Image.open(path) as picture:
                assert picture.mode == mode
                assert np.array(picture).max() < limit
        assert np.load(depth).dtype == np.float32
        assert np.load(depth).shape == (48, 64)


def test_the_mtan_layout_is_the_published_one(written):
    base = written["mtan"]
    assert sorted(p.name for p in (base / "train").iterdir()) == [
        "depth",
        "image",
        "label",
        "normal",
    ]
    assert np.load(base / "val" / "image" / "1.npy").max() <= 1.0
    assert np.load(base / "val" / "depth" / "1.npy").shape == (48, 64, 1)
    normals = np.load(base / "train" / "normal" / "3.npy")
    assert np.allclose(np.linalg.norm(normals, axis=2), 1.0, atol=1e-5)


def test_a_normal_along_an_axis_stays_valid():
    axes = np.concatenate([np.eye(3), -np.eye(3)])[None].astype(np.float32)
    codes = encode_normals(axes)
    assert codes.max() == 254
    assert codes.min() == 0
    decoded = codes / 127.5 - 1.0
    cosine = (decoded * axes).sum(2) / np.linalg.norm(decoded, axis=2)
    assert cosine.min() > 0.9999


def test_depth_beyond_the_limit_is_written_as_unknown(tmp_path):
    config = dataclasses.replace(SMALL, max_depth=3.0)
    for layout, file in (("nyuv2", "depth/0000.npy"), ("mtan", "train/depth/0.npy")):
        write_dataset(config, tmp_path / layout, layout)
        depth, frame = np.load(tmp_path / layout / file).squeeze(), render(config, "train", 0)
        assert np.array_equal(depth, np.where(frame.depth <= 3.0, frame.depth, 0.0))
        assert (depth == 0).any()


def test_an_interrupted_write_goes_on(tmp_path, monkeypatch):
    import sparsemtl.data.write as module

    calls, full = [], True

    def failing(config, split, index):
        if full and (split, index) == ("train", 2):
            raise OSError(28, "No space left on device")
        calls.append((split, index))
        return render(config, split, index)

    monkeypatch.setattr(module, "render", failing)
    with pytest.raises(OSError, match="No space left"):
        write_dataset(SMALL, tmp_path / "out")
    assert not (tmp_path / "out" / "nyu_v2_3task.json").exists()
    assert not list((tmp_path / "out").rglob("*.tmp"))
    full = False
    write_dataset(SMALL, tmp_path / "out")
    everything = [("test", 0), ("test", 1), *(("train", i) for i in range(4))]
    assert sorted(calls) == everything  # each rendered once in all
    assert check_dataset(tmp_path / "out").ok
    write_dataset(SMALL, tmp_path / "out")
    assert len(calls) == len(everything)  # complete: nothing to do


def test_other_files_are_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="other files"):
        write_dataset(SMALL, tmp_path)
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "0000.png").write_text("a real frame")
    with pytest.raises(DataError, match=r"\['img'\] of unknown origin"):
        write_dataset(SMALL, tmp_path, overwrite=True)
    assert (tmp_path / "img" / "0000.png").read_text() == "a real frame"
    (tmp_path / "img" / "0000.png").unlink()
    (tmp_path / "img").rmdir()
    write_dataset(SMALL, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    assert check_dataset(tmp_path).ok


def test_overwriting_leaves_no_stale_frame(tmp_path):
    few = dataclasses.replace(SMALL, frames_train=2, frames_test=1, seed=5)
    for layout in ("mtan", "nyuv2", "mtan"):
        out = tmp_path / "out"
        write_dataset(SMALL, out, layout, overwrite=True)
        with pytest.raises(DataError, match="other settings"):
            write_dataset(few, out, layout)
        write_dataset(few, out, layout, overwrite=True)
        report = check_dataset(out, layout)
        assert report.ok
        assert report.counts["train"] == 2
        assert report.counts["test"] == 1
        assert json.loads((out / MANIFEST).read_text())["complete"] is True


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"layout.*nyuv2.*'coco'"):
        write_dataset(SMALL, tmp_path / "a", "coco")
    with pytest.raises(ValueError, match=r"split.*'dev'"):
        write_dataset(SMALL, tmp_path / "a", splits=("train", "dev"))
    with pytest.raises(ValueError, match=r"split.*'val'"):
        write_dataset(SMALL, tmp_path / "a", "mtan", splits=("val",))
    with pytest.raises(ValueError, match="frames_test >= 1"):
        write_dataset(dataclasses.replace(SMALL, frames_test=0), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="a folder, got the file"):
        write_dataset(SMALL, tmp_path / "file")


def test_val_can_be_written_and_is_used(tmp_path):
    write_dataset(SMALL, tmp_path / "out", splits=("train", "val", "test"))
    config = NYUv2Config(root=str(tmp_path / "out"), image_normalisation="unit")
    found = NYUv2(config, "val")
    assert len(found) == 2
    assert len(NYUv2(config, "train")) == 4
    assert torch.allclose(found[1].image, Scenes(PLAIN, "val")[1].image, atol=1e-6)
