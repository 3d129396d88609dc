"""`sparsemtl compare` and `prune` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsemtl.cli import main
from sparsemtl.cli.grid import claimed

TINY = ["--data-option", "height=32", "width=40", "frames_train=6", "frames_test=2"]
SMALL = [*TINY, "--steps", "10", "--batch-size", "2"]


def compare(out: Path, *words: str) -> int:
    return main(["compare", "--out", str(out), *SMALL, *words])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """dense and rigl finish; rigl cannot keep to 2:4, and says so when it is run."""
    out = tmp_path_factory.mktemp("compare") / "results"
    bad = "rigl+structure=2:4"
    assert compare(out, "--methods", "rigl", bad, "--jobs", "2") == 1
    return out


def test_a_failed_cell_does_not_lose_the_others(results):
    found = json.loads((results / "compare.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["dense", "rigl"]
    (reason,) = found["failed"].values()
    assert reason.startswith("rigl: Expected a structure of whole groups, got 2:4")
    assert abs(found["rows"][1]["sparsity"]["overall"]["mean"] - 0.9) < 1e-3
    text = (results / "compare.md").read_text()
    assert "FAILED" not in text
    assert "rigl_structure=2_4-90-seed0 failed: " in text
    for suffix in (".csv", ".tex", ".png"):
        assert (results / f"compare{suffix}").stat().st_size > 0


def test_finished_cells_are_kept_and_new_ones_join(results, capsys):
    before = {p: p.stat().st_mtime_ns for p in results.glob("cells/*/summary.json")}
    assert compare(results, "--methods", "rigl", "snip") == 0
    assert "2 of 3 runs are finished already" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    found = json.loads((results / "compare.json").read_text())
    assert [row["method"] for row in found["rows"]] == ["dense", "rigl", "snip"]


def test_other_settings_are_refused_and_nothing_is_overwritten(results, capsys):
    before = {p: p.read_bytes() for p in results.rglob("*") if p.is_file()}
    assert compare(results, "--methods", "rigl", "--width", "0.25") == 2
    assert "to hold a comparison of the same settings" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in results.rglob("*") if p.is_file()} == before
    stranger = results.parent / "stranger"
    stranger.mkdir()
    (stranger / "notes.txt").write_text("mine")
    assert compare(stranger, "--methods", "rigl") == 2
    assert [p.name for p in stranger.iterdir()] == ["notes.txt"]


def test_two_comparisons_do_not_share_a_folder(results, capsys):
    with claimed(results):
        assert compare(results, "--methods", "rigl") == 2
    assert "got a comparison at work there" in capsys.readouterr().err


BAD = {
    "methods": (["--methods", "rigl", "rigl"], "each of methods once"),
    "seeds": (["--methods", "rigl", "--seeds", "1", "1"], "each of seeds once"),
    "unknown": (["--methods", "rigll"], "got 'rigll'. Did you mean 'rigl'?"),
    "option": (["--methods", "rigl+drop=0.5"], "a field of method"),
    "value": (["--methods", "rigl+drop_rate=2"], "drop_rate in [0, 1], got 2"),
    "reference": (["--reference", "rigl"], "--reference to be one of ['dense', 'single-task'"),
    "jobs": (["--jobs", "0"], "--jobs >= 1"),
}


@pytest.mark.parametrize(("words", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_starts_nothing(words, message, tmp_path, capsys):
    assert compare(tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "dense"
    words = ["train", "--preset", "quick", "--method", "dense", *SMALL, "--quiet", "--no-plots"]
    assert main([*words, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "magnitude", "--finetune", "4", "--quiet"],
        ["--method", "disparse-pt"],
        ["--method", "snip+batches=2"],
        ["--method", "magnitude+allocation=erk", "--structure", "vector(4)"],
    ],
    ids=["finetune", "disparse-pt", "snip", "structured"],
)
def test_prune_meets_the_budget_on_a_finished_run(trained, tmp_path, words):
    out = tmp_path / "pruned"
    assert main(["prune", str(trained), "--out", str(out), "--sparsity", "0.8", *words]) == 0
    result = json.loads((out / "summary.json").read_text())
    assert abs(result["sparsity"]["overall"] - 0.8) < 1e-3
    assert result["delta"]["reference"] == str(trained)
    dense = load_file(trained / "model" / "model.safetensors")
    pruned = load_file(out / "model" / "model.safetensors")
    same = [torch.where(v == 0, v, dense[k]).equal(v) for k, v in pruned.items() if v.dim() == 4]
    assert all(same) == ("--finetune" not in words)  # only zeros are new


def test_prune_refuses_what_it_cannot_do(trained, tmp_path, capsys):
    first = tmp_path / "first"
    assert main(["prune", str(trained), "--out", str(first), "--sparsity", "0.8"]) == 0
    words = ["prune", str(first), "--out", str(tmp_path / "second"), "--sparsity", "0.5"]
    assert main(words) == 2
    assert "80.00 % zero already, so the nearest is 0.8000" in capsys.readouterr().err
    assert main(["prune", str(trained), "--out", str(tmp_path / "x"), "--method", "rigl"]) == 2
    assert "Expected --method to be one of ['magnitude', 'disparse-pt'" in capsys.readouterr().err
    assert main(["prune", str(trained), "--out", str(first)]) == 2
    assert "Expected --out to be a new or empty folder" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


def test_prune_takes_a_model_whose_layer_has_shrunk(tmp_path):
    run, out = tmp_path / "shrunk", tmp_path / "pruned"
    words = ["--width", "0.125", "--steps", "12", "--batch-size", "8", "--set", "method.warmup=2"]
    data = ["--data-option", "height=32", "width=32", "frames_train=16", "frames_val=8"]
    train = ["train", "--preset", "scenes-distinctiveness", *words, *data, "--quiet", "--no-plots"]
    assert main([*train, "--out", str(run)]) == 0
    hidden = json.loads((run / "model" / "config.json").read_text())["model"]["hidden"]
    assert hidden < 128
    assert main(["prune", str(run), "--out", str(out), "--sparsity", "0.8"]) == 0
    assert abs(json.loads((out / "summary.json").read_text())["sparsity"]["overall"] - 0.8) < 1e-3


def test_a_network_per_task_is_trained_saved_and_measured_again(tmp_path, capsys):
    out, file = tmp_path / "single", tmp_path / "again.json"
    words = ["train", "--preset", "quick", "--method", "single-task", *SMALL, "--quiet"]
    aids = ["--weighting", "dwa", "--balance", "pcgrad", "--mining", "0.5", "--no-plots"]
    assert main([*words, "--out", str(out), "--no-plots"]) == 0
    assert main(["evaluate", str(out), "--json", str(file)]) == 0
    result = json.loads((out / "summary.json").read_text())
    assert json.loads(file.read_text())["metrics"] == result["metrics"]
    assert next(iter(result["sparsity"]["components"])) == "network:segmentation"
    assert main(["prune", str(out), "--out", str(tmp_path / "pruned")]) == 2
    assert "one network for all tasks" in capsys.readouterr().err
    shared = ["train", "--preset", "quick", *SMALL, *aids, "--quiet", "--out", str(tmp_path / "a")]
    assert main(shared) == 0
