"""`sparsemtl similarity` from end to end on tiny networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsemtl.cli import main
from sparsemtl.similarity.analysis import pairs_of

SMALL = (
    *("--width", "0.125", "--quiet", "--batches", "1", "--batch-size", "2"),
    *("--data-option", "height=32", "width=40", "frames_train=4", "frames_val=2"),
)
TASKS = ("depth", "keypoints", "edges")


def similarity(*arguments: object) -> int:
    return main(["similarity", *map(str, arguments), *SMALL])


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    folder = tmp_path_factory.mktemp("similarity") / "out"
    assert similarity("--out", folder, "--tasks", *TASKS, "again=depth", "--seeds", 0, 1) == 0
    return folder


def test_the_report_holds_every_metric_and_pair(analysis):
    found = json.loads((analysis / "similarity.json").read_text())
    tasks = [*TASKS, "again"]
    assert found["tasks"] == tasks
    rows = [line.split("\t") for line in (analysis / "similarity.tsv").read_text().splitlines()]
    assert rows[0] == ["layer_weights", "indexing", "metric", "task_a", "task_b", "mean", "std"]
    equal = {(r[2], r[3], r[4]): float(r[5]) for r in rows[1:] if r[0] == "equal"}
    for metric in ("epi", "iou", "css", "mcss"):
        values = {pair: equal[(metric, *pair)] for pair in pairs_of(tasks)}
        assert max(values, key=lambda pair: values[pair]) == ("depth", "again")
        i, j = tasks.index("depth"), tasks.index("edges")
        assert found["similarity"][metric]["mean"][i][j] == pytest.approx(
            values["depth", "edges"], rel=1e-5
        )
    two = next(g for g in found["groupings"] if (g["budget"], g["by"]) == (3, "css"))
    assert ["depth", "again"] in two["groups"]
    report = (analysis / "similarity.md").read_text()
    assert "| depth / again | 1.000 ± 0.000 |" in report
    assert "AMD" in report or "cores" in report
    layers = (analysis / "similarity_layers.tsv").read_text().splitlines()
    assert len(layers) == 1 + 4 * 4 * 6 * len(found["layers"])


def test_pictures_are_drawn(analysis):
    pytest.importorskip("matplotlib")
    for part in ("tasks", "layers"):
        assert (analysis / f"similarity_{part}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_computes_nothing(analysis, monkeypatch):
    monkeypatch.setattr("sparsemtl.cli.similarity_work.score_seed", None)
    before = files(analysis)
    again = ("--out", analysis, "--tasks", *TASKS, "again=depth", "--seeds", 0, 1)
    assert similarity(*again, "--layer-weights", "linear", "--metric", "iou") == 0
    assert files(analysis)["similarity.tsv"] == before["similarity.tsv"]
    assert "| depth / again | 1.000 ± 0.000 |" in (analysis / "similarity.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", 0, 2), "another similarity.seeds"),
        (("--seeds", 0, 1, "--batches", 2), "another similarity.batches (1, not 2)"),
        (("--seeds", 0, 1, "--data-option", "height=24"), "another data.height (32, not 24)"),
        (("--seeds", 0, 1, "--model", "mobilenetv2"), "another model.name"),
    ],
)
def test_a_folder_of_other_settings_is_left_alone(analysis, capsys, arguments, message):
    before = files(analysis)
    code = main(
        [
            *("similarity", "--out", str(analysis), "--tasks", *TASKS, "again=depth"),
            *SMALL,
            *map(str, arguments),
        ]
    )
    assert code == 2
    assert message in capsys.readouterr().err
    assert files(analysis) == before


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert similarity("--out", tmp_path, "--tasks", *TASKS) == 2
    assert "new or empty folder" in capsys.readouterr().err
    assert list(files(tmp_path)) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "depth"), "at least two tasks to compare, got ['depth']"),
        (("--tasks", "depth", "depth"), "each task once"),
        (("--tasks", "depth", "dept"), "Expected tasks among"),
        (("--tasks", "depth", "edges", "edges=depth"), "each task once"),
        (("--tasks", "depth", "keypoints=depth"), "got keypoints=depth"),
        (("--tasks", "depth", "again=dept"), "got again=dept"),
        (("--tasks", "depth", "edges", "--seeds", 1, 1), "seeds without repetition"),
        (("--tasks", "depth", "edges", "--metric", "cs"), "Did you mean 'css'?"),
        (("--tasks", "depth", "edges", "--layer-weights", "liner"), "Did you mean 'linear'?"),
        (("--tasks", "depth", "edges", "--grouping-budget", 0), "--grouping-budget >= 1, got 0"),
        (("--tasks", "depth", "edges", "--gains", "missing.tsv"), "--gains to name a text file"),
        (("--tasks", "depth", "edges", "--gain-seeds", 1, 1), "each of --gain-seeds once"),
        (("--tasks", "depth", "edges", "--sparsities", 1.0), "sparsity in (0, 1), got 1.0"),
        (("--tasks", "depth", "edges", "--name", "../up"), "file's stem"),
    ],
)
def test_bad_arguments_touch_nothing(tmp_path, capsys, arguments, message):
    assert similarity("--out", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gains_from_a_file(tmp_path, capsys):
    text = "task_a\ttask_b\tgain\ndepth\tkeypoints\t1\ndepth\tedges\t2\nkeypoints\tedges\t3\n"
    (tmp_path / "gains.tsv").write_text(text)
    arguments = ("--out", tmp_path / "out", "--tasks", *TASKS, "--seeds", 0)
    assert similarity(*arguments, "--gains", tmp_path / "gains.tsv") == 0
    found = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert found["gains"]["mean"][0] == [None, 1.0, 2.0]
    assert set(found["gains"]["correlations"]) == {"epi", "iou", "css", "mcss"}
    assert {"by": "gains", "budget": 1}.items() <= found["groupings"][4].items()
    assert "Spearman" in capsys.readouterr().out


def test_measured_gains_resume_and_refuse_other_lengths(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("--out", out, "--tasks", "keypoints", "edges", "--seeds", 0, "--measure-gains")
    assert similarity(*arguments, "--gain-steps", 2) == 0
    cells = sorted(p.name for p in (out / "gains").iterdir())
    assert cells == ["edges_seed_0.json", "keypoints+edges_seed_0.json", "keypoints_seed_0.json"]
    (out / "gains" / cells[1]).unlink()
    first = json.loads((out / "similarity.json").read_text())
    assert similarity(*arguments, "--gain-steps", 2) == 0
    again = json.loads((out / "similarity.json").read_text())
    assert again["gains"] == first["gains"]  # a training repeats bit for bit
    given = ("--tasks", "keypoints", "edges", "--seeds", 0, "--gains", out / "similarity_gains.tsv")
    assert similarity("--out", tmp_path / "given", *given) == 0
    read = json.loads((tmp_path / "given" / "similarity.json").read_text())["gains"]["mean"]
    assert read[0][1] == pytest.approx(first["gains"]["mean"][0][1], rel=1e-5)
    assert similarity(*arguments, "--gain-steps", 3) == 2
    assert "another train.steps (2, not 3)" in capsys.readouterr().err
