"""Checkpoints survive whatever happens while they are written."""

from __future__ import annotations

import json
import resource
import signal

import pytest
import torch

from sparsemtl.errors import CheckpointError
from sparsemtl.training.checkpoint import (
    atomic_write,
    check_same_model,
    checkpoints,
    load_checkpoint,
    save_checkpoint,
    write_json,
)


def test_the_newest_two_are_kept(tmp_path):
    for step in (5, 10, 15, 100_000_0):
        save_checkpoint(tmp_path, step, {"value": torch.tensor(step)})
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000015.pt", "step_01000000.pt"]
    assert load_checkpoint(checkpoints(tmp_path)[-1])["value"] == 1_000_000


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"could not write .*file: .*No space left.*MiB free"):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    good = save_checkpoint(tmp_path, 1, {"value": torch.zeros(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails instead
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(CheckpointError, match="could not write"):
            save_checkpoint(tmp_path, 2, {"value": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    assert torch.equal(load_checkpoint(good)["value"], torch.zeros(10))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 truncated"])
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "step_00000001.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_00000001\.pt is not a readable checkpoint"):
        load_checkpoint(path)


def test_other_formats_and_missing_files_are_named(tmp_path):
    path = tmp_path / "step_00000001.pt"
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match="Expected checkpoint format 1, got 99"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "none.pt")


def test_checkpoints_run_no_code(tmp_path):
    path = tmp_path / "step_00000001.pt"
    torch.save({"format": 1, "evil": print}, path)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)


def test_another_models_checkpoint_is_refused(tmp_path):
    model = {"a": torch.zeros(2, 3), "b": torch.zeros(1)}
    check_same_model(tmp_path, model, dict(model))
    with pytest.raises(CheckpointError, match=r"1 parameters missing \(b\), 1 unknown \(c\)"):
        check_same_model(tmp_path, model, {"a": model["a"], "c": model["b"]})
    with pytest.raises(CheckpointError, match=r"Expected a of shape \(2, 3\), got \(3, 2\)"):
        check_same_model(tmp_path, model, {"a": torch.zeros(3, 2), "b": model["b"]})


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [None, 1.5]}


def test_a_flipped_bit_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"value": torch.zeros(100_000)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)


def test_a_checkpoint_that_lacks_something_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"step": 1})
    with pytest.raises(CheckpointError, match=r"it lacks \['model'\]"):
        load_checkpoint(path, ["step", "model"])
