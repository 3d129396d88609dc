"""The command line as a user types it: train, resume, evaluate, and what bad input gets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsemtl.cli import main
from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.ops.availability import why_not_native
from sparsemtl.sparsity import choice

SMALL = [
    *("--preset", "demo", "--width", "0.125", "--batch-size", "2", "--baseline", "none"),
    *("--data-option", "height=32", "width=40", "frames_train=6", "frames_test=2"),
    "--quiet",
]


def train(out: Path, *words: str) -> int:
    return main(["train", *SMALL, "--out", str(out), *words])


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ["--method", "adapmtl", "--sparsity", "0.83", "--steps", "10", "--seed", "1"]
    assert train(out, *words, "--baseline", "dense") == 0
    return out


def test_a_finished_run_leaves_what_it_should(run):
    result = summary(run)
    assert result["steps"] == 10
    assert result["seconds"] > 0
    assert result["environment"]["torch"] == torch.__version__
    assert set(result["metrics"]) == {"segmentation", "normals", "depth"}
    assert set(result["constant_metrics"]) == set(result["baseline_metrics"])
    assert abs(result["sparsity"]["overall"] - 0.83) < 1e-3
    assert next(iter(result["sparsity"]["components"])) == "backbone"
    assert set(result["delta"]["tasks"]) == set(result["metrics"]) or result["delta"]["reason"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 10
    times = [json.loads(line) for line in (run / "times.jsonl").read_text().splitlines()]
    assert [row["step"] for row in times] == list(range(2, 11))
    assert all(row["seconds"] > 0.0 and row["steps"] == 1 for row in times)
    assert times[-1]["sparsity"] == result["sparsity"]["overall"]
    for name in (
        "config.json",
        "plots/step_time.png",
        "plots/curves.png",
        "plots/allocation.png",
        "plots/predictions.png",
    ):
        assert (run / name).stat().st_size > 0


def test_the_saved_model_has_exactly_the_reported_zeros_under_ordinary_keys(run):
    weights = load_file(run / "model" / "model.safetensors")
    result = summary(run)["sparsity"]
    prunable = {k: v for k, v in weights.items() if v.dim() == 4}
    assert sum(int((v == 0).sum()) for v in prunable.values()) == result["zeros"]
    assert sum(v.numel() for v in prunable.values()) == result["weights"]
    assert result["zeros"] == round(0.83 * result["weights"])
    heads = {"segmentation": 13, "normals": 3, "depth": 1}
    plain = build_model(ModelConfig("deeplab-resnet18", width=0.125), heads)
    plain.load_state_dict(weights)  # strict: an ordinary model's keys and no others
    assert not any("sparsity" in k or "mask" in k for k in weights)


def test_evaluate_repeats_the_metrics(run, tmp_path):
    file = tmp_path / "evaluation.json"
    assert main(["evaluate", str(run), "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["metrics"] == summary(run)["metrics"]
    assert result["sparsity"]["zeros"] == summary(run)["sparsity"]["zeros"]
    assert result["samples"] == 2


def test_the_same_seed_gives_the_same_bytes(run, tmp_path):
    words = ["--method", "adapmtl", "--sparsity", "0.83", "--steps", "10", "--seed", "1"]
    assert train(tmp_path / "again", *words) == 0
    files = [f / "model" / "model.safetensors" for f in (run, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("kernels", ["native", "sparse"])
def test_every_kernel_gives_the_losses_of_the_reference(kernels, tmp_path, monkeypatch):
    """Masks are fixed after 7 of 10 steps.

    The native thresholds have the reference's bits. Sparse convolutions sum in another order, and
    Adam makes whole steps of gradients that are rounding alone, so runs part from 1e-7 on.
    """
    if why_not_native() is not None:
        pytest.skip("needs the native module")
    words, ran = ["--method", "adapmtl", "--sparsity", "0.83", "--steps", "10", "--seed", "1"], []
    monkeypatch.setenv("SPARSEMTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "CHOICES", choice.Choices())
    if kernels == "sparse":
        words += ["--set", "train.runtime.sparse_kernels=true"]
        measured = lambda *_: ran.append(1) or choice.SPARSE  # noqa: E731
        monkeypatch.setattr(choice, "measure", measured)
    else:
        monkeypatch.setenv("SPARSEMTL_BACKEND", kernels)
    assert train(tmp_path / "run", *words) == 0
    assert bool(ran) is (kernels == "sparse")
    monkeypatch.setenv("SPARSEMTL_BACKEND", "reference")
    assert train(tmp_path / "reference", *words[:8]) == 0
    found, expected = (
        [json.loads(x)["loss"] for x in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
        for n in ("run", "reference")
    )
    assert len(found) == len(expected) == 10
    for step, (ours, reference) in enumerate(zip(found, expected, strict=True)):
        tolerance = 1e-6 if kernels == "native" else 1e-5 if step < 2 else 0.1
        assert ours == pytest.approx(reference, rel=tolerance)


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "sparsemtl", "train", *SMALL, "--out", str(out)]
    words = ["--steps", "60", "--sparsity", "0.7", "--checkpoint-every", "7"]
    return subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    log = out / "metrics.jsonl"
    while process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.stderr.read().decode())


def test_killed_runs_resume_to_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(killed)
    wait_for_step(process, killed, 3)  # before the first checkpoint
    process.kill()
    process.communicate()
    for step in (20, 50):  # on the ramp; with the mask fixed
        process = subprocess.Popen(
            [sys.executable, "-m", "sparsemtl", "train", "--resume", str(killed), "--quiet"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        wait_for_step(process, killed, step)
        process.kill()
        process.communicate()
    assert main(["train", "--resume", str(killed), "--quiet"]) == 0
    assert train(whole, "--steps", "60", "--sparsity", "0.7") == 0
    files = [f / "model" / "model.safetensors" for f in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    steps = [json.loads(x)["step"] for x in (killed / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    process = start(out)
    wait_for_step(process, out, 4)
    os.kill(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"sparsemtl train --resume {out}" in error.decode()
    assert list((out / "checkpoints").glob("step_*.pt"))
    assert not (out / "summary.json").exists()
    assert main(["evaluate", str(out)]) == 2


BAD = {
    "sparsity-1": (["--sparsity", "1.0"], "Expected sparsity in [0, 1)"),
    "sparsity-negative": (["--sparsity", "-0.5"], "Expected sparsity in [0, 1)"),
    "sparsity-nan": (["--sparsity", "nan"], "Expected sparsity in [0, 1)"),
    "preset": (["--preset", "demoo"], "'nyuv2-adapmtl-resnet34'"),
    "method": (["--method", "adapmlt"], "got 'adapmlt'. Did you mean 'adapmtl'?"),
    "model": (["--model", "resnet50"], "'deeplab-resnet34'"),
    "task": (["--tasks", "depht"], "got ['depht']"),
    "data": (["--data", "nyu"], "got 'nyu'"),
    "option": (["--data-option", "heigth=3"], "Did you mean 'height'"),
    "option-value": (["--data-option", "height=tall"], "height like 96, got 'tall'"),
    "weighting": (["--weighting", "equal"], "Expected weighting to be one of"),
    "grouping": (["--grouping", "all"], "Expected grouping in"),
    "dense-sparsity": (
        ["--method", "dense", "--sparsity", "0.5"],
        "a method that has --sparsity, got dense",
    ),
    "baseline": (["--baseline", "/no/run"], "/no/run"),
    "steps": (["--steps", "0"], "Expected steps >= 1, got 0"),
    "batch": (["--batch-size", "0"], "Expected batch_size >= 1, got 0"),
    "precision": (["--precision", "fp8"], "Expected precision in"),
    "device": (["--device", "cuda:7"], "Expected a usable device"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_a_sentence_and_leaves_nothing(words, message, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(out, *words) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_data_set_is_named(tmp_path, capsys):
    words = ["train", "--data-root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_folders_are_never_overwritten(run, tmp_path, capsys):
    assert train(run) == 2
    assert f"--resume {run}" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert train(tmp_path) == 2
    assert "Expected --out to be a new or empty folder" in capsys.readouterr().err


def test_resume_takes_nothing_else(run, tmp_path, capsys):
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 2
    assert "got also --steps" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "--out DIR (a new run) or --resume DIR" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "Expected" in capsys.readouterr().err


def test_resuming_a_finished_run_changes_nothing(run):
    before = (run / "model" / "model.safetensors").read_bytes()
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == before


def test_another_models_weights_are_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    assert train(other, "--steps", "1", "--model", "mobilenetv2") == 0
    (other / "model" / "model.safetensors").write_bytes(
        (run / "model" / "model.safetensors").read_bytes()
    )
    assert main(["evaluate", str(other)]) == 1
    assert "another model" in capsys.readouterr().err
    (other / "model" / "model.safetensors").write_bytes(b"damaged")
    assert main(["evaluate", str(other)]) == 1
    assert "not a readable model" in capsys.readouterr().err


def test_a_dense_run_can_be_a_baseline(run, tmp_path):
    out = tmp_path / "run"
    assert train(out, "--steps", "3", "--baseline", str(run / "baseline")) == 0
    assert summary(out)["delta"]["reference"] == str(run / "baseline")


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(run, tmp_path):
    out = tmp_path / "run"
    words = ["--steps", "10", "--sparsity", "0.83", "--seed", "1", "--checkpoint-every", "2"]
    assert train(out, *words) == 0
    newest = sorted((out / "checkpoints").iterdir())[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 3] ^= 255
    newest.write_bytes(data)
    (out / "summary.json").unlink()
    (out / "model" / "model.safetensors").unlink()
    assert main(["train", "--resume", str(out), "--quiet"]) == 0
    files = [f / "model" / "model.safetensors" for f in (run, out)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_ctrl_c_in_the_dense_twin_names_the_whole_run(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "sparsemtl", "train", *SMALL, "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--steps", "30", "--baseline", "dense"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    wait_for_step(process, out / "baseline", 2)
    os.kill(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode().strip().endswith(f"sparsemtl train --resume {out}")
    assert summary(out)["delta"]["reason"].startswith("the reference is not trained yet")
    assert main(["train", "--resume", str(out), "--quiet"]) == 0
    assert summary(out)["delta"]["reference"] == "baseline (dense twin)"


MORE_BAD = {
    "seed": (["--seed", str(2**64)], "Expected seed in [0, 2^63)"),
    "theta": (["--theta-init", "nan"], "Expected finite theta_init"),
    "set-field": (["--set", "train.steps=abc"], "train.steps to be int, got 'abc'"),
    "set-shape": (["--set", "steps"], "Expected --set FIELD=VALUE"),
}


@pytest.mark.parametrize(("words", "message"), MORE_BAD.values(), ids=MORE_BAD.keys())
def test_more_bad_input_gets_a_sentence(words, message, tmp_path, capsys):
    assert train(tmp_path / "run", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_baseline_without_metrics_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{}")
    assert train(tmp_path / "run", "--baseline", str(tmp_path / "bad.json")) == 2
    assert "bad.json" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_backend_that_cannot_run_is_refused_before_the_folder(tmp_path, capsys, monkeypatch):
    for name, code in (("triton", 1), ("nonsense", 2)):
        monkeypatch.setenv("SPARSEMTL_BACKEND", name)
        assert train(tmp_path / "run", "--steps", "2") == code
        assert name in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_file_is_named_in_a_sentence(tmp_path, capsys, workers):
    root = tmp_path / "set"
    size = ["--height", "40", "--width", "48", "--frames", "3", "--frames-test", "1"]
    assert main(["data", "scenes", "--out", str(root), *size]) == 0
    words = ["train", "--preset", "demo", "--data-root", str(root), "--width", "0.125", "--quiet"]
    words += ["--data-option", "crop=32", "--batch-size", "1", "--baseline", "none"]
    victim = sorted((root / "img").glob("*.png"))[0]
    whole = victim.read_bytes()
    out = tmp_path / "run"
    victim.write_bytes(whole[: len(whole) // 2])
    assert main([*words, "--steps", "6", "--workers", workers, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert victim.name in error
    assert "Traceback" not in error
    skipped = tmp_path / "skipped"
    assert main([*words, "--steps", "2", "--on-error", "skip", "--out", str(skipped)]) == 0
    ((file, _),) = summary(skipped)["skipped_files"]["train"]
    assert victim.name in file
