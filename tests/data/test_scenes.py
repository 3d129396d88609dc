"""Rooms: exact to their geometry, the same bits from anywhere, and refused when ill-defined."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sparsemtl.data import Scenes, ScenesConfig, collate
from sparsemtl.data.scene_builder import CLASSES
from sparsemtl.data.scene_geometry import BOX, CYLINDER, ELLIPSOID, cast, surface
from sparsemtl.data.scene_paint import room_rows
from sparsemtl.data.scenes import render, room_of

CONFIG = ScenesConfig(height=48, width=64, frames_train=8, frames_val=4, frames_test=4)
SHAPES = {"one-pixel": (1, 1), "one-row": (1, 37), "odd": (31, 45), "tall": (64, 24)}


def hits_of(config, index):
    room = room_of(config, "train", index)
    hits = cast(room.solids, room.camera, config.height, config.width)
    return room, hits, surface(room.solids, room.camera, hits)


@pytest.mark.parametrize("index", range(6))
def test_every_point_lies_on_the_surface_of_its_solid(index):
    frame = render(CONFIG, "train", index)
    room, hits, _ = hits_of(CONFIG, index)
    rays = room.camera.rays(CONFIG.height, CONFIG.width).reshape(-1, 3)
    points = room.camera.to_world(rays * frame.depth.reshape(-1, 1)) + room.camera.position
    unit = np.abs(room.solids.to_local(hits.primitive, points))
    kind = room.solids.kind[hits.primitive]
    radius = np.sqrt((unit**2).sum(axis=1))
    across = np.maximum(np.hypot(unit[:, 0], unit[:, 1]), unit[:, 2])
    reach = np.select(
        [kind == BOX, kind == ELLIPSOID, kind == CYLINDER], [unit.max(1), radius, across]
    )
    # Depth is float32; divided by the half size of a thin leg its rounding grows.
    slack = 4e-6 / room.solids.half[hits.primitive].min(axis=1)
    assert (np.abs(reach - 1.0) <= slack).all()


@pytest.mark.parametrize("index", range(6))
def test_nothing_stands_between_the_camera_and_a_point(index):
    room, hits, _ = hits_of(CONFIG, index)
    which = np.arange(1, len(room.solids.kind))
    for share in (0.25, 0.6, 0.9, 0.99):
        points = room.camera.position + share * hits.depth[:, None] * hits.ray  # [N, 3]
        unit = room.solids.to_local(which[:, None], points[None])  # [P-1, N, 3]
        kind = room.solids.kind[which][:, None]
        box = np.abs(unit).max(axis=2) < 1 - 1e-6
        ball = (unit**2).sum(axis=2) < 1 - 1e-6
        can = (np.hypot(unit[..., 0], unit[..., 1]) < 1 - 1e-6) & (np.abs(unit[..., 2]) < 1 - 1e-6)
        inside = np.select([kind == BOX, kind == ELLIPSOID, kind == CYLINDER], [box, ball, can])
        assert not inside.any()


@pytest.mark.parametrize("index", range(6))
def test_normals_are_unit_face_the_camera_and_match_finite_differences(index):
    frame = render(CONFIG, "train", index)
    room, hits, seen = hits_of(CONFIG, index)
    rays = room.camera.rays(CONFIG.height, CONFIG.width)
    assert np.allclose(np.linalg.norm(frame.normals, axis=2), 1.0, atol=1e-6)
    assert ((frame.normals * rays).sum(axis=2) < 1e-6).all()
    points = rays * frame.depth[..., None]  # [H, W, 3]
    across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    estimate = np.cross(down, across)  # towards the camera: z up, rows downwards
    estimate /= np.linalg.norm(estimate, axis=2, keepdims=True)
    name = (hits.primitive * 8 + seen.face).reshape(frame.depth.shape)
    centre = name[1:-1, 1:-1]
    around = (name[1:-1, 2:], name[1:-1, :-2], name[2:, 1:-1], name[:-2, 1:-1])
    flat = (seen.face.reshape(name.shape)[1:-1, 1:-1] < 6) & np.all(
        [side == centre for side in around], axis=0
    )
    assert flat.mean() > 0.3
    cosine = (estimate * frame.normals[1:-1, 1:-1]).sum(axis=2)[flat]
    # The room's parallel walls share a face number with nothing else, so this is one plane each.
    assert (cosine > 0.9999).all()


def test_curved_normals_point_along_the_gradient():
    checked = 0
    for index in range(8):
        room, hits, seen = hits_of(CONFIG, index)
        solids = room.solids
        ball = (solids.kind[hits.primitive] == ELLIPSOID) & (solids.turn[hits.primitive, 0] == 1.0)
        which = hits.primitive[ball]
        offset = (
            room.camera.position + hits.depth[ball, None] * hits.ray[ball] - solids.centre[which]
        )
        gradient = offset / solids.half[which] ** 2
        gradient /= np.linalg.norm(gradient, axis=1, keepdims=True)
        assert np.allclose(seen.normal[ball], gradient, atol=1e-6)
        everyone = solids.kind[hits.primitive] == ELLIPSOID
        assert (seen.face[everyone] == 6).all()
        checked += int(everyone.sum())
    assert checked > 50


@pytest.mark.parametrize("index", range(4))
def test_labels_are_those_of_the_solids(index):
    frame = render(CONFIG, "train", index)
    room, hits, seen = hits_of(CONFIG, index)
    labels = frame.segmentation.ravel()
    shell = hits.primitive == 0
    assert (labels[~shell] == room.looks.label[hits.primitive[~shell]]).all()
    rows = room_rows(seen.face[shell])
    names = np.array([CLASSES.index(name) for name in ("wall", "floor", "ceiling")])
    assert (labels[shell] == names[rows]).all()
    height = room.camera.position[2] + hits.depth * hits.ray[:, 2]
    floor, ceiling = names[1], names[2]
    assert np.allclose(height[shell & (labels == floor)], 0.0, atol=1e-9)
    top = 2 * room.solids.half[0, 2]
    assert np.allclose(height[shell & (labels == ceiling)], top, atol=1e-9)


def test_keypoint_peaks_are_visible_corners_and_edges_peak_at_steps():
    frame = render(CONFIG, "train", 1)
    for name in ("keypoints", "edges"):
        values = getattr(frame, name)
        assert values.min() >= 0.0
        assert values.max() == 1.0
    step = np.abs(np.diff(np.log(frame.depth), axis=1)) > 0.3
    assert step.any()
    assert (frame.edges[:, 1:][step] == 1.0).all()
    assert (frame.edges[:, :-1][step] == 1.0).all()


def test_a_blank_wall_has_no_edges():
    from sparsemtl.data.scene_targets import edges

    room, _hits, _seen = hits_of(CONFIG, 0)
    rays = room.camera.rays(20, 30)
    normal = np.array([0.3, -0.9, 0.1]) / np.linalg.norm([0.3, -0.9, 0.1])
    depth = -2.0 / (rays @ normal)
    flat = edges(rays * depth[..., None], np.broadcast_to(normal, rays.shape), 2.0)
    assert flat.max() < 1e-9


def test_every_class_occurs_and_frames_differ():
    config = ScenesConfig(height=48, width=64)
    frames = [render(config, "train", i) for i in range(40)]
    labels = np.concatenate([frame.segmentation.ravel() for frame in frames])
    assert set(labels.tolist()) == set(range(13))
    assert len({frame.image.tobytes() for frame in frames}) == 40
    assert max(np.bincount(labels)) < 0.6 * labels.size


def test_splits_seeds_and_indices_are_disjoint_streams():
    keys = [("train", 0, 0), ("val", 0, 0), ("test", 0, 0), ("train", 1, 0), ("train", 0, 1)]
    pictures = {
        render(dataclasses.replace(CONFIG, seed=seed), split, index).image.tobytes()
        for split, seed, index in keys
    }
    assert len(pictures) == len(keys)


def test_the_number_of_frames_changes_no_frame():
    more = dataclasses.replace(CONFIG, frames_train=100, frames_val=9)
    assert_same(Scenes(CONFIG, "train")[3], Scenes(more, "train")[3])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache", [0, 2**20, 2**30])
def test_the_same_bits_from_any_worker_and_any_cache(workers, cache):
    config = dataclasses.replace(CONFIG, cache_bytes=cache)
    expected = [Scenes(dataclasses.replace(CONFIG, cache_bytes=0), "train")[i] for i in range(8)]
    dataset = Scenes(config, "train")
    for _ in range(2):
        loader = DataLoader(dataset, batch_size=3, num_workers=workers, collate_fn=collate)
        for batch in loader:
            for row, index in enumerate(batch.index.tolist()):
                assert_same_row(batch, row, expected[index])


def test_samples_are_copies_of_the_cache():
    dataset = Scenes(dataclasses.replace(CONFIG, flip=False), "train")
    first = dataset[0]
    for tensor in (first.image, *first.targets.values(), *first.valid.values()):
        tensor.zero_()
    assert dataset[0].image.abs().sum() > 0
    assert all(t.abs().sum() > 0 for t in dataset[0].targets.values())


def test_a_flip_mirrors_everything_and_negates_x():
    plain = Scenes(dataclasses.replace(CONFIG, flip=False), "train")
    flipped = 0
    for epoch in range(6):
        for index in range(4):
            base, sample = plain.sample(index, epoch), Scenes(CONFIG, "train").sample(index, epoch)
            if torch.equal(base.image, sample.image):
                continue
            flipped += 1
            assert torch.equal(sample.image, base.image.flip(-1))
            for task, target in base.targets.items():
                mirrored = target.flip(-1)
                if task == "normals":
                    mirrored = mirrored * torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
                assert torch.equal(sample.targets[task], mirrored), task
    assert 6 <= flipped <= 18


def test_validation_and_test_are_never_flipped():
    for split in ("val", "test"):
        dataset = Scenes(CONFIG, split)
        assert_same(dataset.sample(0, 0), dataset.sample(0, 5))


def test_depth_beyond_the_limit_is_invalid_and_zero():
    sample = Scenes(dataclasses.replace(CONFIG, max_depth=3.0, flip=False), "train")[0]
    full = Scenes(dataclasses.replace(CONFIG, flip=False), "train")[0]
    depth, valid = sample.targets["depth"][0], sample.valid["depth"]
    assert torch.equal(valid, full.targets["depth"][0] <= 3.0)
    assert not valid.all()
    assert (depth[~valid] == 0).all()
    assert torch.equal(depth[valid], full.targets["depth"][0][valid])


@pytest.mark.parametrize("size", SHAPES.values(), ids=SHAPES.keys())
def test_any_size(size):
    config = dataclasses.replace(CONFIG, height=size[0], width=size[1])
    sample = Scenes(config, "train")[1]
    assert sample.image.shape == (3, *size)
    assert sample.image.dtype == torch.float32
    for task, target in sample.targets.items():
        channels = {"segmentation": (), "normals": (3,)}.get(task, (1,))
        assert target.shape == (*channels, *size)
        assert sample.valid[task].shape == size
        assert sample.valid[task].dtype == torch.bool
    assert sample.targets["segmentation"].dtype == torch.int64


def test_antialiasing_changes_the_picture_only():
    fine = Scenes(dataclasses.replace(CONFIG, antialias=3, flip=False), "train")[0]
    plain = Scenes(dataclasses.replace(CONFIG, flip=False), "train")[0]
    assert not torch.equal(fine.image, plain.image)
    assert (fine.image - plain.image).abs().mean() < 0.3
    for task in plain.targets:
        assert torch.equal(fine.targets[task], plain.targets[task])


def test_tasks_are_chosen_in_the_dataset_order():
    dataset = Scenes(CONFIG, "train", ["depth", "segmentation"])
    assert list(dataset.spec.targets) == ["segmentation", "depth"]
    assert list(dataset[0].targets) == list(dataset[0].valid) == ["segmentation", "depth"]


def test_rgb_undoes_the_normalisation():
    for name in ("caffe_bgr", "imagenet", "unit"):
        dataset = Scenes(dataclasses.replace(CONFIG, image_normalisation=name, flip=False), "train")
        picture = torch.from_numpy(dataset.frame(0).image).permute(2, 0, 1) / 255.0
        assert torch.allclose(dataset.rgb(dataset[0].image), picture, atol=1e-5)


BAD = {
    "no-height": {"height": 0},
    "negative-depth": {"max_depth": -1.0},
    "nan-depth": {"max_depth": float("nan")},
    "negative-seed": {"seed": -1},
    "fish-eye": {"field_of_view": 180.0},
    "frames": {"frames_train": -1},
    "normalisation": {"image_normalisation": "caffe"},
    "no-rays": {"antialias": 0},
    "half-a-pixel": {"height": 96.5},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD.keys())
def test_a_bad_config_names_the_field(fields):
    with pytest.raises(ValueError, match=rf"ScenesConfig: Expected .*{next(iter(fields))}.* got"):
        ScenesConfig(**fields)


def test_bad_use_is_refused():
    with pytest.raises(ValueError, match=r"Expected split in .*train.*, got 'dev'"):
        Scenes(CONFIG, "dev")
    with pytest.raises(ValueError, match="frames_val >= 1"):
        Scenes(dataclasses.replace(CONFIG, frames_val=0), "val")
    with pytest.raises(ValueError, match=r"among .*normals.*, got \['pose'\]"):
        Scenes(CONFIG, "train", ["depth", "pose"])
    with pytest.raises(IndexError, match=r"0\.\.7, got 8"):
        Scenes(CONFIG, "train")[8]


def assert_same(a, b):
    assert torch.equal(a.image, b.image)
    for task in a.targets:
        assert torch.equal(a.targets[task], b.targets[task])
        assert torch.equal(a.valid[task], b.valid[task])


def assert_same_row(batch, row, sample):
    assert torch.equal(batch.image[row], sample.image)
    for task, target in sample.targets.items():
        assert torch.equal(batch.targets[task][row], target)
        assert torch.equal(batch.valid[task][row], sample.valid[task])
