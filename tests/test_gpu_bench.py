"""`make gpu` where there is no GPU, its plan, and what it makes of results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import LIMIT, Run, main
from bench.gpu_common import Setting
from bench.gpu_plan import in_bounds, plan
from bench.gpu_report import markdown, speedups, write
from bench.gpu_sections import SECTIONS
from bench.gpu_sections import run as run_jobs
from bench.gpu_timing import best, times
from sparsemtl.ops.availability import why_not_triton

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


def test_a_case_that_fails_leaves_its_traceback_and_the_others(tmp_path):
    def bad():
        raise AssertionError("forward differs from torch by 1 of 2")

    out = tmp_path / "rows.json"
    jobs = iter([("one", lambda: {"speedup": 2.0}), ("two", bad), ("three", lambda: {"ms": 1.0})])
    assert run_jobs(jobs, out, "G2") == 1
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["one", "two", "three"]
    assert rows["two"]["failed"]["error"] == "forward differs from torch by 1 of 2"
    assert "in bad" in rows["two"]["failed"]["traceback"]
    text = markdown({"machine": {}, "parts": {}, "rows": {"G2": rows}})
    assert "| G2 two | failed | not run | forward differs from torch by 1 of 2 |" in text


class Device:
    """Stands for a machine with a GPU: parts answer as told, and are remembered."""

    def __init__(self, monkeypatch, answers: dict[str, int]) -> None:
        self.called: list[str] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("bench.gpu.machine", lambda: {"gpu": "a stub"})
        monkeypatch.setattr("bench.gpu.build", lambda run: None)
        monkeypatch.setattr("bench.gpu.sanitize", lambda run: True)

        def ran(command, timeout, **_):
            name = command[3] if "bench.gpu_sections" in command else command[2]
            self.called.append(name.split(".")[-1])
            if answers.get(self.called[-1]) is None:
                if "--out" in command:
                    rows = {"case": {"speedup": 2.0}}
                    Path(command[-1]).write_text(json.dumps({"rows": rows}))
                return subprocess.CompletedProcess(command, 0, "fine\n")
            if answers[self.called[-1]] == -1:
                raise subprocess.TimeoutExpired(command, timeout, output=b"so far\n")
            return subprocess.CompletedProcess(command, 1, "Traceback\nRuntimeError: broken\n")

        monkeypatch.setattr("bench.gpu.subprocess.run", ran)


def drive(monkeypatch, folder, *arguments: str) -> tuple[int, dict]:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(folder), *arguments])
    status = main()
    return status, json.loads((folder / "gpu.json").read_text())


def test_one_failing_section_loses_itself_alone(monkeypatch, tmp_path):
    device = Device(monkeypatch, {"G2": 1, "G3": -1})
    status, result = drive(monkeypatch, tmp_path)
    assert status == 1
    assert result["passed"] is False
    states = {name: part["state"] for name, part in result["parts"].items()}
    assert states["G2"] == "failed"
    assert states["G3"] == "stopped"
    assert {n: s for n, s in states.items() if n in ("G1", "G4", "G5", "G6")} == dict.fromkeys(
        ("G1", "G4", "G5", "G6"), "passed"
    )
    assert "RuntimeError: broken" in result["parts"]["G2"]["output"]
    assert result["parts"]["G3"]["output"] == "so far\n"
    assert set(result["rows"]) == set(SECTIONS) - {"G2", "G3"}
    assert device.called[0] == "gpu_gate"
    text = (tmp_path / "gpu.md").read_text()
    assert "a stub" in text
    assert "The run FAILED" in text


def test_a_red_gate_fails_the_run_and_the_rest_is_still_checked(monkeypatch, tmp_path):
    Device(monkeypatch, {"gpu_gate": 1})
    status, result = drive(monkeypatch, tmp_path, "--only", "G1")
    assert status == 1
    assert result["parts"]["gate"]["state"] == "failed"
    assert result["parts"]["G1"]["state"] == "passed"


def test_a_run_that_passes(monkeypatch, tmp_path):
    device = Device(monkeypatch, {})
    status, result = drive(monkeypatch, tmp_path)
    assert status == 0
    assert result["passed"] is True
    assert device.called[-len(SECTIONS) :] == list(SECTIONS)


def test_when_the_time_is_up_nothing_more_begins(monkeypatch, tmp_path):
    device = Device(monkeypatch, {})
    status, result = drive(monkeypatch, tmp_path, "--limit", "0")
    assert status == 1  # nothing was checked
    assert device.called == []
    assert {part["state"] for part in result["parts"].values()} == {"skipped"}


def test_the_limit_stays_below_nine_minutes():
    """Twelve seconds are for starting, and for what a killed child still needs."""
    assert LIMIT <= 9 * 60 - 12


@pytest.mark.interpreter
@pytest.mark.parametrize("name", list(SECTIONS))
def test_each_section_runs_small(name, tmp_path, monkeypatch):
    """In the interpreter: what a section checks and calls is there and agrees with torch."""
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path))
    monkeypatch.setenv("SPARSEMTL_AUTOTUNE", "0")
    if why_not_triton() is not None:
        pytest.skip(str(why_not_triton()))
    out = tmp_path / "rows.json"
    failed = run_jobs(SECTIONS[name](Setting("cpu", small=True)), out, name)
    assert failed == 0, out.read_text()
    assert json.loads(out.read_text())["rows"]


def test_a_candidate_that_fails_says_why():
    def bad() -> None:
        raise RuntimeError("no such kernel")

    found = times({"ours": bad, "dense": lambda: None}, torch.device("cpu"), 0.01)
    assert found["ours"] == {"error": "RuntimeError: no such kernel"}
    assert best(found, "ours") is None
    assert best(found, "dense") is not None


def test_sections_are_those_that_are_run():
    assert set(SECTIONS) >= {"G1", "G2", "G3", "G5", "G6"}
