"""Two processes under torchrun (gloo): one run, equal masks, one process's result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsemtl.training.evaluate import evaluate
from sparsemtl.training.loop import train
from tests.methods.processes_worker import NAMES, build, dataset

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("processes_worker.py")


def launch(out: Path, processes: int) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes), str(WORKER), str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / f"found{processes}.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("two"), 2)


@pytest.mark.parametrize("name", [*NAMES, "balanced"])
def test_both_processes_end_with_the_same_masks_and_weights(two, name):
    first, second = two[name]
    assert first == second


@pytest.mark.parametrize("patterns", ["pass", "epoch"])
def test_a_layer_shrinks_alike_in_both_processes(two, patterns):
    first, second = two[f"distinctiveness, {patterns}"]
    assert first == second
    first, second = two[f"sizes, {patterns}"]
    assert first == second
    assert first[-1] < first[0] == 24


@pytest.mark.parametrize("what", ["resumed", "resumed, distinctiveness"])
def test_two_processes_resume_to_the_same_bits(two, what):
    assert two[what] == [True, True]


def test_two_processes_compute_what_one_does(two):
    state = build("dense", norm=False, steps=6)
    train(state)
    assert two["processes"] == 2
    for task, loss in state.losses.items():
        assert two["losses"][task] == pytest.approx(loss, rel=1e-4)
    for task, metrics in evaluate(state.model, state.tasks, dataset("test")).items():
        assert two["metrics"][task] == pytest.approx(metrics, rel=1e-3)


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    from sparsemtl.training import distributed
    from sparsemtl.training.state import TrainConfig, _check_batch

    monkeypatch.setattr(distributed, "size", lambda: 2)
    _check_batch(TrainConfig(batch_size=4))
    with pytest.raises(ValueError, match="batch_size to be a multiple of the 2 processes, got 3"):
        _check_batch(TrainConfig(batch_size=3))


def test_the_command_line_runs_in_two_processes(tmp_path):
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [
        *("train", "--preset", "quick", "--method", "rigl", "--steps", "6", "--batch-size", "4"),
        *("--data-option", "height=32", "width=40", "frames_train=6", "frames_test=3"),
        *("--quiet", "--no-plots", "--out", str(out)),
    ]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "sparsemtl", *words),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((out / "summary.json").read_text())
    assert abs(summary["sparsity"]["overall"] - 0.9) < 1e-3
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6  # one process writes
    assert done.stdout.count("everything is in") == 1
