"""`make gpu` where there is no GPU, its plan, and what it makes of results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import Run
from bench.gpu_report import markdown, speedups, write
from bench.gpu_sections import SECTIONS, in_bounds, plan
from bench.gpu_timing import best, times

ROOT = Path(__file__).parent.parent
RESULT = {
    "machine": {"gpu": "a GPU", "torch": "2.13"},
    "parts": {"tests": {"state": "skipped", "reason": "not installed: a | b", "at": 3.0}},
    "rows": {
        "G2": {
            "rate 6": {
                "forward": {"ours 1": {"ms": 1.0, "low": 0.9, "high": 1.1}, "speedup": 1.5},
                "weight-grad": {"ours 1": {"error": "no | memory"}},
            }
        },
        "G1": {"adam": {"ours": {"ms": 2.0, "low": 1.9, "high": 2.1}, "speedup": 4.0}},
    },
}


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    done = call()
    assert done.returncode == 2
    assert done.stdout == "gpu: torch sees no CUDA device here, nothing was run\n"


def test_the_plan_lists_every_goal_with_its_floor():
    done = call("--plan")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(list(plan()))
    for goal in ("G1", "G2", "G3", "G4", "G5", "G6"):
        assert any(line.startswith(goal) and line.endswith(" ms") for line in lines)
    assert abs(dict(plan())["G1 threshold_adam, 90.7 M weights"] - 0.63) < 0.01


def test_shares_in_bounds_are_those_of_the_handbook():
    shares = [in_bounds(rate, 41) for rate in (6, 12, 18, 24)]
    assert [round(share, 2) for share in shares] == [0.81, 0.65, 0.50, 0.37]


def test_results_become_a_table_and_a_picture(tmp_path):
    assert speedups(RESULT) == [("G2 rate 6, forward", 1.5), ("G1 adam", 4.0)]
    write(RESULT, tmp_path)
    assert json.loads((tmp_path / "gpu.json").read_text()) == RESULT
    text = (tmp_path / "gpu.md").read_text()
    assert text == markdown(RESULT)
    assert "| tests | skipped | not installed: a / b | 3.0 |" in text
    assert "| G2 rate 6, weight-grad | ours 1 | not run | no / memory |" in text
    assert "| G1 adam | 4.00 |" in text


def test_a_part_that_takes_too_long_is_stopped_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.gpu.LIMITS", {"gate": 6, "tests": 60})
    run = Run(30.0, tmp_path)
    begin = time.perf_counter()
    code = "import time; print('one', flush=True); time.sleep(60)"
    state, output = run.call("gate", [sys.executable, "-c", code])
    assert (state, output) == ("stopped", "one\n")
    assert time.perf_counter() - begin < 20
    run.limit = 0.0
    assert run.call("tests", [sys.executable, "-c", "1"])[0] == "skipped"
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [parts[name]["state"] for name in ("gate", "tests")] == ["stopped", "skipped"]


def test_a_candidate_that_fails_says_why():
    def bad() -> None:
        raise RuntimeError("no such kernel")

    found = times({"ours": bad, "dense": lambda: None}, torch.device("cpu"), 0.01)
    assert found["ours"] == {"error": "RuntimeError: no such kernel"}
    assert best(found, "ours") is None
    assert best(found, "dense") is not None


def test_sections_are_those_that_are_run():
    assert set(SECTIONS) >= {"G1", "G2", "G3", "G5", "G6"}
