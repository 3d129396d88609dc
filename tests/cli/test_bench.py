"""`sparsemtl bench`: files, exit codes, one-line errors."""

from __future__ import annotations

import json

import pytest

from sparsemtl.cli import main
from sparsemtl.measure import bench_conv
from sparsemtl.ops.availability import why_not_native

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason="needs the native module")
CASE = ["--case", "mobilenetv2/1x1-1024-3@11", "--compile-seconds", "0", "--seconds", "0.05"]


def test_conv_writes_rows_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "conv.json", tmp_path / "conv.png"
    files = ["--json", str(out), "--plot", str(picture)]
    assert main(["bench", "conv", "--sparsity", "0.5", "0.9", *CASE, *files]) == 0
    found = json.loads(out.read_text())
    assert [(r["pass"], r["sparsity"]) for r in found["rows"]] == [
        *(("forward", 0.5), ("training", 0.5), ("forward", 0.9), ("training", 0.9)),
    ]
    assert found["machine"]
    assert found["environment"]["threads"] >= 1
    assert found["roof"]["flops"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert found["machine"] in printed
    assert "mobilenetv2/1x1-1024-3@11" in printed


def test_a_pass_can_be_picked_and_bars_are_drawn_at_one_sparsity(tmp_path):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "a.json", tmp_path / "a.svg"
    arguments = ["--pass", "forward", *CASE, "--json", str(out), "--plot", str(picture)]
    assert main(["bench", "conv", *arguments]) == 0
    assert [r["pass"] for r in json.loads(out.read_text())["rows"]] == ["forward"]
    assert "speed-up" in picture.read_text()


@pytest.mark.parametrize("verb", [["threshold"], ["adam"]])
def test_elementwise_benches_take_a_number_of_weights(verb, tmp_path):
    out = tmp_path / "rows.json"
    arguments = ["--weights", "1000", "--rounds", "2", "--json", str(out)]
    assert main(["bench", *verb, *arguments]) == 0
    assert {row["case"] for row in json.loads(out.read_text())["rows"]} == {"1,000 weights"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["conv", "--sparsity", "1.0"],
            "Expected --sparsity in [0, 1), a fraction of zeros, got 1",
        ),
        (
            ["conv", "--sparsity", "nan"],
            "Expected --sparsity in [0, 1), a fraction of zeros, got nan",
        ),
        (["conv", "--case", "nosuch"], "Expected --case to be (part of) a name such as"),
        (["conv", "--pass", "backward"], "Expected --pass to be one of"),
        (
            ["conv", "--structure", "vector(5)"],
            "Expected --structure to be one of ['element', 'vector(4)'",
        ),
        (["conv", "--threads", "0"], "Expected --threads in 1.."),
        (["conv", "--threads", "100000"], "got 100000"),
        (["conv", "--compile-seconds", "-1"], "Expected --compile-seconds >= 0, got -1"),
        (["conv", "--seconds", "0"], "Expected --seconds > 0, got 0"),
        (["conv", "--isa", "sse"], "Expected --isa to be one of"),
        (["adam", "--weights", "0"], "Expected --weights >= 1, got 0"),
        (["threshold", "--rounds", "0"], "Expected --rounds >= 1, got 0"),
        (["threshold", "--sparsity", "-0.1"], "Expected --sparsity in [0, 1)"),
        (["conv", "--json", "/"], "Expected --json to name a file, got the folder /"),
        (
            ["conv", "--json", "/dev/null/x.json"],
            "Expected --json to name a file in a folder that",
        ),
        (["conv", "--plot", "picture.xyz"], "Expected --plot to end in .png, .svg or .pdf"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, message, capsys, monkeypatch):
    def measured(*_args, **_kwargs):
        raise AssertionError("measured before the arguments were checked")

    monkeypatch.setattr("sparsemtl.cli.bench.measure_roof", measured)
    assert main(["bench", *arguments]) == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert message in first
    assert first.startswith("error: ")
    assert rest == ["(SPARSEMTL_TRACEBACK=1 shows where)"]


def test_a_red_gate_prints_no_number_and_fails(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench_conv, "relative_error", lambda *_: 0.5)
    out = tmp_path / "conv.json"
    assert main(["bench", "conv", *CASE, "--json", str(out)]) == 1
    printed = capsys.readouterr()
    assert "got a relative error of 5.0e-01" in printed.err
    assert "mobilenetv2/1x1" not in printed.out
    assert not out.exists()
