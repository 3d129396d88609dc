"""Vehicle-X: the miniature is what the reader reads, labels are exact, damage is named."""

from __future__ import annotations

import re
import shutil
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from sparsemtl.cli import main
from sparsemtl.data import VehicleXConfig, build_dataset, check_dataset, count_frames
from sparsemtl.data.base import DataError
from sparsemtl.data.vehiclex import COLOURS, LABELS, TYPES, find_vehiclex
from sparsemtl.data.vehiclex_write import VehicleXMiniature, write_vehiclex

SMALL = VehicleXMiniature(train=8, val=2, test=4, vehicles=5, cameras=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("vehiclex") / "set"
    assert write_vehiclex(SMALL, root) == {"train": 8, "val": 2, "test": 4}
    return root


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "set")


def items(root):
    return list(next(iter(ElementTree.parse(root / LABELS).getroot())))


def test_the_layout_is_the_published_one(written):
    assert sorted(p.name for p in written.iterdir()) == sorted(
        [LABELS, "list_color.txt", "list_type.txt", "train", "val", "test"]
    )
    found = items(written)
    assert len(found) == 14
    assert set(found[0].attrib) == {
        *("imageName", "vehicleID", "cameraID", "colorID", "typeID", "orientation"),
        *("lightInt", "lightDir", "camHei", "camDis"),
    }
    for element in found:
        a = element.attrib
        assert re.fullmatch(rf"{a['vehicleID']}_{a['cameraID']}_\d+\.jpg", a["imageName"])
    with Image.open(next((written / "train").iterdir())) as picture:
        assert (picture.format, picture.size, picture.mode) == ("JPEG", (256, 256), "RGB")


def test_labels_are_those_of_the_xml(written):
    config = VehicleXConfig(root=str(written), crop=None)
    by_name = {e.attrib["imageName"]: e.attrib for e in items(written)}
    for split, count in (("train", 8), ("val", 2), ("test", 4)):
        data = build_dataset(config, split)
        assert len(data) == count
        cameras = data.spec.targets["camera"].class_names
        for index in range(count):
            sample, found = data.sample(index), by_name[data.names[index]]
            assert sample.targets["vehicle"].item() == int(found["vehicleID"]) - 1
            assert COLOURS[sample.targets["colour"]] == COLOURS[int(found["colorID"])]
            assert sample.targets["vehicle_type"].item() == int(found["typeID"])
            assert cameras[sample.targets["camera"]] == found["cameraID"]
            assert all(v.shape == (1, 1) and bool(v) for v in sample.valid.values())
    assert count_frames(config) == {"train": 8, "val": 2, "test": 4}
    assert data.spec.targets["vehicle"].channels == 1362
    assert data.spec.targets["vehicle_type"].class_names == TYPES


def test_crops_and_flips_depend_on_seed_epoch_and_index_alone(written):
    config = VehicleXConfig(root=str(written), crop=100)
    data = build_dataset(config, "train", ["colour"])
    again = build_dataset(config, "train", ["colour"])
    assert data.sample(3, 1).image.shape == (3, 100, 100)
    assert torch.equal(data.sample(3, 1).image, again.sample(3, 1).image)
    assert not torch.equal(data.sample(3, 1).image, data.sample(3, 2).image)
    test, whole = (
        build_dataset(VehicleXConfig(root=str(written), crop=c), "test") for c in (100, None)
    )
    centre = whole.sample(1).image[:, 78:178, 78:178]
    assert torch.equal(test.sample(1, 5).image, centre)
    plain = VehicleXConfig(root=str(written), crop=100, augmentation="none")
    assert torch.equal(
        build_dataset(plain, "train").sample(0, 4).image,
        build_dataset(plain, "train").sample(0, 9).image,
    )


def test_the_root_may_lie_above_the_archive(written, tmp_path):
    inner = tmp_path / "vehicle-x_v2" / "Classification Task"
    shutil.copytree(written, inner)
    assert find_vehiclex(tmp_path) == inner
    assert len(build_dataset(VehicleXConfig(root=str(tmp_path)), "test")) == 4


def test_pictures_without_an_item_are_left_out_and_counted(copied, caplog):
    source = next((copied / "train").iterdir())
    shutil.copy(source, copied / "train" / "0001_c001_999.jpg")
    data = build_dataset(VehicleXConfig(root=str(copied)), "train")
    assert len(data) == 8
    assert data.skipped == [("train/0001_c001_999.jpg", "no item in the XML")]
    assert "1 pictures of train have no labels" in caplog.text


def test_other_encodings_are_read(copied):
    text = (copied / LABELS).read_text()
    (copied / LABELS).write_text(text.replace("utf-8", "gb2312", 1))
    assert len(build_dataset(VehicleXConfig(root=str(copied)), "train")) == 8


def edited(root, **changes):
    tree = ElementTree.parse(root / LABELS)
    next(iter(next(iter(tree.getroot())))).attrib.update(changes)
    tree.write(root / LABELS)


@pytest.mark.parametrize(
    "changes",
    [
        {"colorID": "12"},
        {"typeID": "-1"},
        {"vehicleID": "1363"},
        {"cameraID": "5"},
        {"typeID": "x"},
    ],
)
def test_labels_out_of_range_are_named(copied, changes):
    edited(copied, **changes)
    with pytest.raises(DataError, match=r"Expected vehicleID 1\.\.1362"):
        build_dataset(VehicleXConfig(root=str(copied)), "train")
    report = check_dataset(copied)
    assert report.layout == "vehiclex"
    assert report.by_kind()["labels"] == 1


def test_check_lists_everything_that_is_wrong(copied, capsys):
    assert check_dataset(copied).ok
    first, second, third = sorted((copied / "train").iterdir())[:3]
    first.write_bytes(b"no picture")
    Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(second)
    shutil.copy(third, copied / "val" / "0009_c009_77.jpg")
    (copied / "list_type.txt").unlink()
    found = check_dataset(copied)
    assert found.by_kind() == {"list": 1, "missing": 1, "unreadable": 1, "size": 1}
    assert main(["data", "check", str(copied)]) == 1
    assert first.name in capsys.readouterr().out
    (copied / LABELS).write_text("<broken")
    assert check_dataset(copied, "vehiclex").by_kind() == {"unreadable": 1}
    with pytest.raises(DataError, match="readable XML"):
        build_dataset(VehicleXConfig(root=str(copied)))


def test_bad_arguments_are_named(written, tmp_path):
    with pytest.raises(DataError, match=f"Expected {LABELS} there"):
        build_dataset(VehicleXConfig(root=str(tmp_path)))
    with pytest.raises(ValueError, match="crop <= 256"):
        build_dataset(VehicleXConfig(root=str(written), crop=300))
    with pytest.raises(ValueError, match="split in"):
        build_dataset(VehicleXConfig(root=str(written)), "tran")
    with pytest.raises(DataError, match="new or an empty folder"):
        write_vehiclex(SMALL, written)
    with pytest.raises(ValueError, match=r"vehicles in 1\.\.1362, got 0"):
        VehicleXMiniature(vehicles=0)


def test_from_the_command_line_to_a_trained_network(tmp_path, capsys):
    root, run = tmp_path / "set", tmp_path / "run"
    words = ["data", "vehiclex", "--out", str(root), "--frames", "8", "--frames-test", "4"]
    assert main(words) == 0
    assert main(["data", "check", str(root)]) == 0
    words = ["train", "--preset", "vehiclex-distinctiveness", "--data-root", str(root)]
    words += ["--data-option", "crop=64", "--steps", "2", "--batch-size", "4", "--width", "0.125"]
    assert main([*words, "--out", str(run), "--set", "method.theta=60", "--quiet"]) == 0
    assert main(["evaluate", str(run)]) == 0
    assert "accuracy" in capsys.readouterr().out
