"""The NYUv2 readers: both layouts, every option, the real frames, and damaged input."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sparsemtl.data import (
    DataError,
    NYUv2,
    NYUv2Config,
    Scenes,
    ScenesConfig,
    build_dataset,
    collate,
    count_frames,
)
from sparsemtl.data.image import CAFFE_BGR_MEAN
from sparsemtl.data.nyuv2_labels import NAMES_13, NAMES_40, to_13, to_40

TASKS = ("segmentation", "normals", "depth")
CROP = (32, 40)


def config_of(root, **fields):
    return NYUv2Config(**{"root": str(root), "crop": CROP, "val_fraction": 0.0, **fields})


@pytest.mark.parametrize("layout", ["nyuv2", "mtan"])
@pytest.mark.parametrize("augmentation", ["geometric", "as_published", "none"])
def test_samples_have_the_promised_form(written, layout, augmentation):
    dataset = NYUv2(config_of(written[layout], augmentation=augmentation), "train")
    assert len(dataset) == 4
    assert tuple(dataset.spec.targets) == TASKS
    for epoch in range(3):
        for index in range(4):
            sample = dataset.sample(index, epoch)
            assert sample.image.shape == (3, *CROP)
            assert sample.image.dtype == torch.float32
            assert sample.targets["segmentation"].dtype == torch.int64
            assert sample.targets["normals"].shape == (3, *CROP)
            assert sample.targets["depth"].shape == (1, *CROP)
            for task in TASKS:
                assert sample.valid[task].dtype == torch.bool
                assert (sample.targets[task][..., ~sample.valid[task]] == 0).all()


@pytest.mark.parametrize("layout", ["nyuv2", "mtan"])
def test_samples_depend_on_epoch_and_index_alone(written, layout):
    config = config_of(written[layout])
    first, second = NYUv2(config, "train"), NYUv2(config, "train")
    expected = [first.sample(i, 2) for i in (3, 0)]
    second.sample(1, 7)
    for sample, index in zip(expected, (3, 0), strict=True):
        again = second.sample(index, 2)
        assert torch.equal(sample.image, again.image)
        assert not torch.equal(sample.image, second.sample(index, 3).image)
    batches = list(DataLoader(first, batch_size=4, num_workers=2, collate_fn=collate))
    assert torch.equal(batches[0].image[2], second[2].image)


def test_a_flipped_sample_is_mirrored_with_x_negated(written):
    """With no zoom and no room to crop, the flip is all that is drawn."""
    config = config_of(written["nyuv2"], scale=(1.0, 1.0), crop=(48, 64))
    right = NYUv2(config, "train")
    published = NYUv2(dataclasses.replace(config, augmentation="as_published"), "train")
    plain = NYUv2(dataclasses.replace(config, augmentation="none"), "train")
    seen = set()
    for epoch in range(12):
        base, sample, raw = plain[0], right.sample(0, epoch), published.sample(0, epoch)
        flipped = not torch.equal(base.image, sample.image)
        seen.add(flipped)
        if flipped:
            assert torch.equal(sample.image, base.image.flip(-1))
            normals, mirrored = sample.targets["normals"], base.targets["normals"].flip(-1)
            assert torch.equal(normals[0], -mirrored[0])
            assert torch.equal(normals[1:], mirrored[1:])
            assert torch.equal(raw.targets["normals"], mirrored)
    assert seen == {False, True}


def test_encoded_normals_are_the_stored_bytes_in_bgr(written):
    config = config_of(written["nyuv2"], normals="encoded", augmentation="none", crop=(48, 64))
    dataset = NYUv2(config, "train")
    assert dataset.spec.targets["normals"].normals_space == "encoded"
    codes = np.array(Image.open(written["nyuv2"] / "normal_mask" / "0001.png"))
    found = dataset[1].targets["normals"]
    assert torch.equal(found, torch.from_numpy(codes[..., ::-1].copy()).permute(2, 0, 1).float())


def test_caffe_bgr_is_the_default(written):
    config = config_of(written["nyuv2"], augmentation="none", crop=(48, 64))
    picture = np.array(Image.open(written["nyuv2"] / "img" / "0002.png")).astype(np.float32)
    expected = picture[..., ::-1] - np.array(CAFFE_BGR_MEAN, dtype=np.float32)
    assert np.array_equal(NYUv2(config, "train")[2].image.permute(1, 2, 0).numpy(), expected)


def test_forty_classes_collapse_to_thirteen(written):
    assert len(NAMES_40) == 40
    assert len(NAMES_13) == 13
    everything = np.arange(256, dtype=np.uint8)
    assert set(to_13(everything[:40]).tolist()) == set(range(13))
    assert (to_13(everything[40:]) == 255).all()
    assert (to_13(to_40(np.arange(13))) == np.arange(13)).all()
    same = {"bed", "books", "ceiling", "chair", "floor", "picture", "sofa", "table", "wall"}
    for name in same | {"window"}:
        assert NAMES_13[to_13(everything)[NAMES_40.index(name)]] == name
    config = config_of(written["nyuv2"], augmentation="none", crop=(48, 64), classes=40)
    forty = NYUv2(config, "train")
    thirteen = NYUv2(dataclasses.replace(config, classes=13), "train")
    assert forty.spec.targets["segmentation"].channels == 40
    labels = forty[0].targets["segmentation"].numpy().astype(np.uint8)
    assert np.array_equal(to_13(labels), thirteen[0].targets["segmentation"].numpy())


def test_thirteen_classes_are_mapped_where_none_are_stored(copied):
    root = copied["nyuv2"]
    config = config_of(root, augmentation="none", crop=(48, 64))
    stored = NYUv2(config, "train")[0].targets["segmentation"]
    for file in (root / "seg13").iterdir():
        file.unlink()
    (root / "seg13").rmdir()
    assert torch.equal(NYUv2(config, "train")[0].targets["segmentation"], stored)


def test_evaluation_sees_whole_or_resized_frames(written):
    for split, size in (("test", (48, 64)), ("train", CROP)):
        assert NYUv2(config_of(written["nyuv2"]), split).spec.image_size == size
    dataset = NYUv2(config_of(written["nyuv2"], eval_resize=(21, 33)), "test")
    sample = dataset[1]
    assert dataset.spec.image_size == (21, 33)
    assert sample.image.shape == (3, 21, 33)
    assert torch.equal(dataset.sample(0, 0).image, dataset.sample(0, 9).image)
    whole = NYUv2(config_of(written["nyuv2"]), "test")[1]
    depths = set(whole.targets["depth"].flatten().tolist())
    assert set(sample.targets["depth"].flatten().tolist()) <= depths


def test_the_mtan_layout_trains_on_whole_frames(written):
    dataset = NYUv2(NYUv2Config(root=str(written["mtan"])), "train")
    assert dataset.spec.image_size == dataset[0].image.shape[1:] == (48, 64)


def test_validation_is_held_out_of_train(written):
    config = config_of(written["nyuv2"], val_fraction=0.5)
    train, val = NYUv2(config, "train"), NYUv2(config, "val")
    assert count_frames(config) == {"train": 2, "val": 2, "test": 2}
    assert len(train) == len(val) == 2
    assert not set(train.frames) & set(val.frames)
    assert NYUv2(config, "val").frames == val.frames
    halves = [NYUv2(config, name).frames for name in ("train1", "train2")]
    assert sorted(map(str, halves[0] + halves[1])) == sorted(map(str, train.frames))
    assert torch.equal(val.sample(0, 0).image, val.sample(0, 3).image)
    drawn = {NYUv2(dataclasses.replace(config, seed=s), "val").frames for s in range(12)}
    assert len(drawn) > 1


def test_an_empty_val_says_what_to_do(written):
    config = config_of(written["nyuv2"])
    assert count_frames(config)["val"] == 0
    with pytest.raises(DataError, match=r"val_fraction 0.0 of 4 training frames"):
        NYUv2(config, "val")


def test_the_lists_own_val_is_used(copied):
    root = copied["nyuv2"]
    edit_list(root, lambda lists: lists.update(val=[lists["train"].pop()]))
    config = config_of(root, val_fraction=0.5)
    assert count_frames(config) == {"train": 3, "val": 1, "test": 2}


def test_only_the_files_of_the_tasks_are_read(copied):
    for folder in ("depth", "normal_mask"):
        for file in (copied["nyuv2"] / folder).iterdir():
            file.unlink()
    sample = build_dataset(config_of(copied["nyuv2"]), "train", ["segmentation"])[0]
    assert list(sample.targets) == ["segmentation"]


# --- damaged input -------------------------------------------------------------------------


def save_png(path, array, **options):
    Image.fromarray(array).save(path, **options)


def edit_npy(path, change):
    array = np.load(path)
    result = change(array)
    np.save(path, array if result is None else result)


def edit_list(root, change):
    path = root / "nyu_v2_3task.json"
    lists = json.loads(path.read_text())
    result = change(lists)
    path.write_text(json.dumps(lists if result is None else result))


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))


def spoil(path, value):
    def change(array):
        array[3, 5] = value

    edit_npy(path, change)


GRAY = np.full((48, 64), 40, dtype=np.uint8)
DAMAGE = {  # layout, file of training frame 1, what happens to it, words of the error
    "image-cut": ("nyuv2", "img/0001.png", cut, "damaged"),
    "image-bit": ("nyuv2", "img/0001.png", flip_a_bit, "damaged"),
    "image-empty": ("nyuv2", "img/0001.png", lambda p: p.write_bytes(b""), "0 bytes"),
    "image-text": ("nyuv2", "img/0001.png", lambda p: p.write_text("hello"), "another kind"),
    "image-gone": ("nyuv2", "img/0001.png", lambda p: p.unlink(), "no such file"),
    "image-gray": ("nyuv2", "img/0001.png", lambda p: save_png(p, GRAY), "RGB.*mode L"),
    "label-40": (
        "nyuv2",
        "seg13/0001.png",
        lambda p: save_png(p, GRAY),
        r"1\.\.13.*\[40\] in 3072",
    ),
    "label-size": ("nyuv2", "seg13/0001.png", lambda p: save_png(p, GRAY[:9] * 0), r"\[48, 64\]"),
    "normal-bit": ("nyuv2", "normal_mask/0001.png", flip_a_bit, "damaged"),
    "normal-gray": ("nyuv2", "normal_mask/0001.png", lambda p: save_png(p, GRAY), "mode L"),
    "depth-nan": ("nyuv2", "depth/0001.npy", lambda p: spoil(p, np.nan), "finite.*1 NaN or inf"),
    "depth-inf": ("nyuv2", "depth/0001.npy", lambda p: spoil(p, np.inf), "finite.*1 NaN or inf"),
    "depth-cut": ("nyuv2", "depth/0001.npy", cut, "damaged"),
    "depth-size": (
        "nyuv2",
        "depth/0001.npy",
        lambda p: edit_npy(p, lambda a: a[1:]),
        r"\[47, 64\]",
    ),
    "depth-flat": ("nyuv2", "depth/0001.npy", lambda p: edit_npy(p, np.ravel), r"\[H, W\]"),
    "depth-int": ("nyuv2", "depth/0001.npy", lambda p: edit_npy(p, np.int32), "floating.*int32"),
    "depth-text": ("nyuv2", "depth/0001.npy", lambda p: p.write_text("hello"), "damaged"),
    "depth-pickle": (
        "nyuv2",
        "depth/0001.npy",
        lambda p: np.save(p, np.array([{}]), allow_pickle=True),
        "damaged|numeric",
    ),
    "mtan-image-nan": ("mtan", "train/image/1.npy", lambda p: spoil(p, np.nan), "3 NaN"),
    "mtan-image-255": (
        "mtan",
        "train/image/1.npy",
        lambda p: edit_npy(p, lambda a: a * 255),
        r"\[0, 1\]",
    ),
    "mtan-image-chw": (
        "mtan",
        "train/image/1.npy",
        lambda p: edit_npy(p, lambda a: a.transpose(2, 0, 1)),
        r"\[H, W, 3\]",
    ),
    "mtan-label-13": ("mtan", "train/label/1.npy", lambda p: spoil(p, 13), r"0\.\.12.*\[13\]"),
    "mtan-label-half": ("mtan", "train/label/1.npy", lambda p: spoil(p, 0.5), "fractions"),
    "mtan-label-nan": ("mtan", "train/label/1.npy", lambda p: spoil(p, np.nan), "NaN"),
    "mtan-normal-nan": ("mtan", "train/normal/1.npy", lambda p: spoil(p, np.nan), "3 NaN"),
    "mtan-depth-gone": ("mtan", "train/depth/1.npy", lambda p: p.unlink(), "no such file"),
}


@pytest.mark.parametrize("case", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_bad_file_is_named_or_skipped(copied, case, caplog):
    layout, name, damage, words = case
    path = copied[layout] / name
    damage(path)
    config = config_of(copied[layout])
    dataset = NYUv2(config, "train")
    assert dataset[0].image.shape == (3, *CROP)
    with pytest.raises(DataError, match=rf"(?s){path.name}.*{words}") as caught:
        dataset[1]
    assert caught.value.problem.file == str(path)
    skipping = NYUv2(dataclasses.replace(config, on_error="skip"), "train")
    assert len(skipping) == 3
    assert [file for file, _ in skipping.skipped] == [str(path)]
    assert str(path) in caplog.text
    assert len(list(DataLoader(skipping, batch_size=1, collate_fn=collate))) == 3


def test_a_bad_file_is_named_from_a_worker_too(copied):
    cut(copied["nyuv2"] / "img" / "0001.png")
    dataset = NYUv2(config_of(copied["nyuv2"]), "train")
    with pytest.raises(DataError, match=r"0001\.png"):
        list(DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=collate))


def test_errors_travel_by_pickle(copied):
    cut(copied["nyuv2"] / "img" / "0001.png")
    with pytest.raises(DataError) as caught:
        NYUv2(config_of(copied["nyuv2"]), "train")[1]
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_nothing_left_after_skipping_is_an_error(copied):
    for path in (copied["nyuv2"] / "img").iterdir():
        cut(path)
    with pytest.raises(DataError, match="readable frame in 'train', got 4 bad ones"):
        NYUv2(config_of(copied["nyuv2"], on_error="skip"), "train")


LISTS = {
    "not-a-dict": (lambda lists: [1], "a dict"),
    "unknown-key": (lambda lists: lists.update(valid=[]), "'valid'"),
    "no-test": (lambda lists: lists.pop("test") and None, "'test'"),
    "not-a-list": (lambda lists: lists.update(train={}), "a list at 'train'"),
    "three-paths": (lambda lists: lists["train"][1].pop() and None, r"four paths.*'train'\[1\]"),
    "a-number": (lambda lists: lists["train"][0].__setitem__(2, 7), r"four paths.*'train'\[0\]"),
    "empty": (lambda lists: lists.update(test=[]), "at least one frame in split 'test'"),
}


@pytest.mark.parametrize("case", LISTS.values(), ids=LISTS.keys())
def test_a_bad_list_is_refused(copied, case):
    change, words = case
    edit_list(copied["nyuv2"], change)
    with pytest.raises(DataError, match=words):
        NYUv2(config_of(copied["nyuv2"]), "test")


def test_bad_roots_are_named(tmp_path):
    with pytest.raises(ValueError, match="Expected root"):
        NYUv2(NYUv2Config(), "train")
    with pytest.raises(DataError, match=r"nowhere.*nothing there"):
        NYUv2(NYUv2Config(root=str(tmp_path / "nowhere")), "train")
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"nyu_v2_3task\.json.*photos"):
        NYUv2(NYUv2Config(root=str(tmp_path)), "train")
    (tmp_path / "nyu_v2_3task.json").write_text("{not json")
    with pytest.raises(DataError, match=r"nyu_v2_3task\.json.*a json"):
        NYUv2(NYUv2Config(root=str(tmp_path)), "train")


BAD = {
    "layout": {"layout": "nyu"},
    "classes": {"classes": 14},
    "normals": {"normals": "raw"},
    "augmentation": {"augmentation": "all"},
    "on_error": {"on_error": "ignore"},
    "scale": {"scale": (1.5, 0.5)},
    "crop": {"crop": (0, 3)},
    "eval_resize": {"eval_resize": (3,)},
    "val_fraction": {"val_fraction": 1.0},
    "seed": {"seed": -1},
    "mtan-encoded": {"normals": "encoded", "layout": "mtan"},
    "mtan-40": {"classes": 40, "layout": "mtan"},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD.keys())
def test_a_bad_config_names_the_field(fields):
    with pytest.raises(ValueError, match=rf"NYUv2Config: Expected .*{next(iter(fields))}.* got"):
        NYUv2Config(root="x", **fields)


def test_mtan_found_by_itself_has_thirteen_decoded_classes(written):
    with pytest.raises(ValueError, match="classes = 13 with layout mtan"):
        NYUv2(config_of(written["mtan"], classes=40), "train")
    with pytest.raises(ValueError, match="Expected split"):
        NYUv2(config_of(written["mtan"]), "valid")


# --- the real frames -----------------------------------------------------------------------


def test_real_frames_are_read_exactly(sample_root):
    config = NYUv2Config(root=str(sample_root), augmentation="none", crop=(480, 640), classes=40)
    train, test = NYUv2(config, "train"), NYUv2(config, "test")
    assert (len(train), len(test)) == (3, 1)
    for dataset in (train, test):
        for index, files in enumerate(dataset.frames):
            sample = dataset[index]
            seg, depth = np.array(Image.open(files.segmentation)), np.load(files.depth)
            codes = np.array(Image.open(files.normals)).astype(np.float64)
            valid = {task: mask.numpy() for task, mask in sample.valid.items()}
            assert np.array_equal(valid["segmentation"], seg != 255)
            labels = sample.targets["segmentation"].numpy()
            assert np.array_equal(labels[seg != 255], seg[seg != 255])
            assert np.array_equal(valid["depth"], depth > 3e-5)
            assert np.array_equal(sample.targets["depth"][0].numpy(), depth * valid["depth"])
            decoded = codes / 127.5 - 1.0
            length = np.linalg.norm(decoded, axis=2, keepdims=True)
            expected = (codes.max(2) < 255) & (length[..., 0] >= 0.5)
            assert np.array_equal(valid["normals"], expected)
            normals = sample.targets["normals"].permute(1, 2, 0).numpy()
            assert np.allclose(normals[expected], (decoded / length)[expected], atol=1e-5)


def test_the_thirteen_classes_of_real_frames_are_the_published_ones(sample_root):
    assert (sample_root / "seg13").is_dir()
    config = NYUv2Config(root=str(sample_root), augmentation="none", crop=(480, 640))
    for split in ("train", "test"):
        dataset = NYUv2(config, split)
        for index, files in enumerate(dataset.frames):
            sample = dataset[index]
            valid = sample.valid["segmentation"].numpy()
            labels = sample.targets["segmentation"].numpy()
            mapped = to_13(np.array(Image.open(files.segmentation)))
            assert np.array_equal(valid, mapped != 255)
            assert np.array_equal(labels[valid], mapped[valid])


def test_real_normals_agree_with_real_depth_in_the_stated_axes(sample_root):
    """x right, y forward, z up: normals from depth by finite differences point the same way."""
    dataset = NYUv2(NYUv2Config(root=str(sample_root)), "test")
    sample = dataset[0]
    depth, normals = sample.targets["depth"][0].numpy(), sample.targets["normals"].numpy()
    rows, columns = np.mgrid[:480, :640]
    x, z = (columns - 320) / 519 * depth, (240 - rows) / 519 * depth
    points = np.stack((x, depth, z), axis=2)
    step = 6
    across = points[step:-step, 2 * step :] - points[step:-step, : -2 * step]
    down = points[2 * step :, step:-step] - points[: -2 * step, step:-step]
    estimate = np.cross(down, across)
    estimate /= np.linalg.norm(estimate, axis=2, keepdims=True)
    valid = sample.valid["normals"].numpy()[step:-step, step:-step]
    stored = normals.transpose(1, 2, 0)[step:-step, step:-step]
    angles = np.degrees(np.arccos(np.clip((estimate * stored).sum(2), -1, 1)))
    assert np.median(angles[valid]) < 15.0


def test_real_frames_survive_every_augmentation(sample_root):
    for augmentation in ("geometric", "as_published", "none"):
        for space in ("decoded", "encoded"):
            config = NYUv2Config(root=str(sample_root), augmentation=augmentation, normals=space)
            dataset = NYUv2(config, "train")
            batch = collate([dataset.sample(i, 4) for i in range(3)])
            assert batch.image.shape == (3, 3, 321, 321)
            assert all(torch.isfinite(t).all() for t in batch.targets.values())


def test_scenes_and_readers_share_their_axes(written):
    """A written room comes back with its own normals, so both use the same axes."""
    config = ScenesConfig(height=48, width=64, frames_train=4, flip=False)
    rooms = Scenes(config, "train")
    config = config_of(written["nyuv2"], augmentation="none", crop=(48, 64))
    found, expected = NYUv2(config, "train")[0], rooms[0]
    cosine = (found.targets["normals"] * expected.targets["normals"]).sum(0)
    assert cosine.min() > 0.9999
