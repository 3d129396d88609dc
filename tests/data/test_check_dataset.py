"""`check_dataset` lists every problem once, names the file, and goes on."""

import json

import numpy as np
import pytest
from PIL import Image

from sparsemtl.data import check_dataset


def rewrite(path, change):
    array = np.load(path)
    np.save(path, change(array))


def with_value(value):
    def change(array):
        array[2, 2] = value
        return array

    return change


def test_good_folders_are_ok(written):
    for layout, files in (("nyuv2", 30), ("mtan", 24)):
        for named in (None, layout):
            report = check_dataset(written[layout], named)
            assert report.ok
            assert not report.problems
            assert report.counts["files"] == files
            assert report.counts["train"] == 4
            assert json.loads(json.dumps(report.to_json()))["ok"] is True
            assert "ok" in str(report)


def test_every_problem_is_listed_once(copied):
    root = copied["nyuv2"]
    (root / "img" / "0000.png").write_bytes((root / "img" / "0000.png").read_bytes()[:-50])
    (root / "img" / "0001.png").unlink()
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(root / "seg" / "0002.png")
    Image.fromarray(np.full((48, 64), 77, np.uint8)).save(root / "seg" / "0003.png")
    Image.fromarray(np.full((48, 64), 14, np.uint8)).save(root / "seg13" / "0003.png")
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(root / "normal_mask" / "0004.png")
    rewrite(root / "depth" / "0000.npy", with_value(np.nan))
    rewrite(root / "depth" / "0001.npy", with_value(-1.0))
    rewrite(root / "depth" / "0002.npy", np.float64)
    rewrite(root / "depth" / "0003.npy", lambda a: a[:, 1:])
    rewrite(root / "depth" / "0005.npy", with_value(np.inf))
    report = check_dataset(root)
    found = {(p.file.removeprefix(f"{root}/"), p.kind) for p in report.problems}
    assert found == {
        ("img/0000.png", "unreadable"),
        ("img/0001.png", "missing"),
        ("seg/0002.png", "size"),
        ("seg/0003.png", "labels"),
        ("seg13/0003.png", "labels"),
        ("normal_mask/0004.png", "dtype"),
        ("depth/0000.npy", "values"),
        ("depth/0001.npy", "values"),
        ("depth/0002.npy", "dtype"),
        ("depth/0003.npy", "size"),
        ("depth/0005.npy", "values"),
    }
    assert len(report.problems) == len(found) == report.counts["problems"]
    assert not report.ok
    assert report.by_kind()["values"] == 3
    data = json.loads(json.dumps(report.to_json()))
    assert {"file", "kind", "expected", "found"} == set(data["problems"][0])
    for problem in report.problems:
        assert problem.file in str(report)


def test_lists_are_checked(copied):
    path = copied["nyuv2"] / "nyu_v2_3task.json"
    lists = json.loads(path.read_text())
    lists["train"] = [lists["train"][0], lists["train"][0], lists["test"][0], ["img/0001.png"]]
    lists["extra"] = []
    path.write_text(json.dumps(lists))
    report = check_dataset(copied["nyuv2"])
    assert report.by_kind() == {"list": 2, "duplicate": 2}
    text = str(report)
    for words in ("'extra'", "'train'[3]", "2 times", "no frame of 'test'"):
        assert words in text


def test_empty_and_missing_lists_are_reported(copied):
    path = copied["nyuv2"] / "nyu_v2_3task.json"
    path.write_text(json.dumps({"train": []}))
    kinds = [(p.kind, p.expected) for p in check_dataset(copied["nyuv2"]).problems]
    assert kinds == [("missing", "the key 'test'"), ("list", "at least one frame in 'train'")]


def test_mtan_gaps_and_dtypes_are_reported(copied):
    root = copied["mtan"]
    (root / "train" / "label" / "1.npy").unlink()
    (root / "val" / "depth" / "0.npy").write_bytes(b"")
    rewrite(root / "train" / "image" / "2.npy", with_value(np.nan))
    rewrite(root / "train" / "normal" / "2.npy", np.float64)
    rewrite(root / "train" / "label" / "3.npy", with_value(13))
    (root / "train" / "depth" / "notes.txt").write_text("hello")
    found = {(p.file.removeprefix(f"{root}/"), p.kind) for p in check_dataset(root).problems}
    assert found == {
        ("train/label/1.npy", "missing"),
        ("val/depth/0.npy", "unreadable"),
        ("train/image/2.npy", "values"),
        ("train/normal/2.npy", "dtype"),
        ("train/label/3.npy", "labels"),
        ("train/depth/notes.txt", "list"),
    }


def test_a_gap_in_the_numbers_is_reported_and_costs_nothing(copied):
    base = copied["mtan"] / "train"
    for folder in ("image", "label", "normal", "depth"):
        (base / folder / "3.npy").rename(base / folder / "2000000000.npy")
    report = check_dataset(copied["mtan"])
    assert [p.kind for p in report.problems] == ["list"]
    assert "4 numbers up to 2000000000" in str(report)
    assert report.counts["train"] == 4


def test_missing_folders_and_roots_are_reported(copied, tmp_path):
    for file in (copied["mtan"] / "val" / "label").iterdir():
        file.unlink()
    (copied["mtan"] / "val" / "label").rmdir()
    report = check_dataset(copied["mtan"])
    assert {p.kind for p in report.problems} == {"missing"}
    assert len(report.problems) == 3
    for root in (tmp_path / "nowhere", tmp_path):
        report = check_dataset(root)
        assert not report.ok
        assert len(report.problems) == 1
        assert str(root) in str(report)
    with pytest.raises(ValueError, match=r"layout.*'coco'"):
        check_dataset(tmp_path, "coco")


def test_the_real_sample_is_ok(sample_root):
    report = check_dataset(sample_root)
    assert report.ok, str(report)
    assert report.counts["train"] == 3
    assert report.counts["test"] == 1
