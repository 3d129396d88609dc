"""A run killed by SIGKILL, whatever it was doing, resumes to the bits of one that was not."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from sparsemtl.cli import main

# Forks of a process that has imported everything: a killed run costs no start of Python.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["sparsemtl.cli.bench", "sparsemtl.cli.runner", "torch._dynamo"])

SMALL = [
    *("--data-option", "height=32", "width=40", "frames_train=6", "frames_test=2"),
    *("--batch-size", "2", "--steps", "16", "--threads", "1", "--checkpoint-every", "2"),
    *("--quiet", "--no-plots"),
]
PRUNED = ["--preset", "quick", *SMALL]
CLASSES = ["--preset", "scenes-distinctiveness", *SMALL, "--model", "vgg11", "--width", "0.125"]
# Those with the most to remember: a rewind point, rounds, moving masks, sizes. AdapMTL's
# thresholds are killed in tests/cli/test_train.py.
WORDS = {
    "lth": [*PRUNED, "--method", "lth", "--set", "method.rewind_to=0.25"],
    "imp": [*PRUNED, "--method", "imp", "--set", "method.fraction=0.4"],
    "disparse-dynamic": [
        *PRUNED,
        *("--method", "disparse-dynamic", "--set", "method.update_every=2"),
    ],
    "distinctiveness": [*CLASSES, "--set", "method.theta=60"],
}


def killed_after(words: list[str], out: Path, step: int) -> None:
    """Start the command and kill it once its log holds `step` steps."""
    process = context.Process(target=main, args=(["train", *words],))
    process.start()
    log = out / "metrics.jsonl"
    while process.is_alive() and not (log.exists() and log.read_text().count("\n") >= step):
        time.sleep(0.002)
    assert process.is_alive(), f"the run ended before step {step}"
    process.kill()
    process.join()


@pytest.mark.parametrize("name", WORDS)
def test_killed_twice_a_run_ends_with_the_same_bytes(name, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["train", *WORDS[name], "--out", str(whole)]) == 0
    killed_after([*WORDS[name], "--out", str(killed)], killed, 5)
    killed_after(["--resume", str(killed), "--quiet", "--no-plots"], killed, 11)
    assert not (killed / "summary.json").exists()
    assert main(["train", "--resume", str(killed), "--quiet", "--no-plots"]) == 0
    files = [folder / "model" / "model.safetensors" for folder in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
