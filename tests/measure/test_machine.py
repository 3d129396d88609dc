"""The machine line and memory readings."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys

import pytest
import torch

from sparsemtl.measure import (
    environment,
    machine_line,
    memory,
    peak_rss_bytes,
    rss_bytes,
    track_peak,
)
from sparsemtl.measure import environment as environment_function

ON_LINUX = sys.platform.startswith("linux")


def test_environment_is_json_and_complete():
    env = json.loads(json.dumps(environment()))
    assert {"cpu", "cores", "threads", "ram_bytes", "os", "python", "gpus", "git"} <= env.keys()
    assert env["torch"] == torch.__version__ or env["torch"] in torch.__version__
    assert env["cores"] >= 1
    assert env["threads"] == torch.get_num_threads()
    assert env["sparsemtl"]
    assert env["native"]


def test_machine_line_is_one_line_and_says_what_is_missing():
    line = machine_line()
    assert "\n" not in line
    assert "torch" in line
    bare = {**environment(), "cpu": None, "ram_bytes": None, "git": None}
    assert machine_line(bare).startswith("unknown CPU, ")


def test_a_machine_without_git(monkeypatch):
    def no_git(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    assert environment_function()["git"] is None


@pytest.mark.skipif(not ON_LINUX, reason="reads /proc")
def test_peak_of_a_block():
    size = 64 << 20
    with track_peak() as peak:
        before = rss_bytes()
        with mmap.mmap(-1, size) as block:  # fresh pages; malloc may reuse resident ones
            block.write(bytes([1]) * size)
    assert before is not None
    assert peak.resident is not None
    assert peak.resident >= before + 0.9 * size
    assert peak_rss_bytes() >= rss_bytes() * 0.9


def test_systems_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "absent")
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "absent" / "too")
    assert rss_bytes() is None
    with track_peak() as peak:
        pass
    assert peak.since_start
    assert peak.resident is None or peak.resident > 0
