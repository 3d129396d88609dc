"""`sparsemtl report`: one page, complete, closed in itself; and repeating a run from its config."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser

import pytest

from sparsemtl.cli import main

TINY = ["--width", "0.0625", "--batch-size", "2", "--steps", "6", "--threads", "1", "--quiet"]
TINY += ["--data-option", "height=32", "width=40", "frames_train=6", "frames_test=2"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "run"
    words = ["train", "--preset", "demo", *TINY, "--baseline", "none", "--out", str(out)]
    assert main([*words, "--sparsity", "0.7"]) == 0
    return out


def test_the_page_holds_the_runs_numbers_and_nothing_from_elsewhere(run, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    page = Page((run / "report.html").read_text("utf-8"))
    summary = json.loads((run / "summary.json").read_text())
    assert not page.open
    assert "70.00 %" in page.texts
    assert f"{summary['metrics']['depth']['rel_err']:.4g}" in page.texts
    assert f"{summary['sparsity']['component_weights']['head:normals']:,}" in page.texts
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)


def test_text_is_escaped_and_absent_pictures_are_left_out(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "plots")
    summary = json.loads((copy / "summary.json").read_text())
    summary["model"] = "<script>alert(1)</script>"
    (copy / "summary.json").write_text(json.dumps(summary))
    out = tmp_path / "page.html"
    assert main(["report", str(copy), "--out", str(out)]) == 0
    text = out.read_text("utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert not Page(text).links


def test_what_is_no_finished_run_is_refused(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("report.html"))
    (copy / "summary.json").write_text("{}")
    assert main(["report", str(copy)]) == 2
    assert "Expected" in capsys.readouterr().err
    (copy / "summary.json").unlink()
    assert main(["report", str(copy)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert not (copy / "report.html").exists()


def test_a_run_repeats_from_its_config(run, tmp_path):
    again = tmp_path / "again"
    words = ["train", "--preset", str(run / "config.json"), "--quiet", "--out", str(again)]
    assert main(words) == 0
    for name in ("config.json", "model/model.safetensors"):
        assert (again / name).read_bytes() == (run / name).read_bytes()


def test_what_was_measured_of_the_compiled_model_is_on_the_page(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    words = ["bench", "model", str(copy), "--input", "1,3,32,40", "--against", "torch"]
    assert main([*words, "--rounds", "3", "--json", str(copy / "inference.json")]) == 0
    assert main(["report", str(copy)]) == 0
    page = Page((copy / "report.html").read_text("utf-8"))
    rows = json.loads((copy / "inference.json").read_text())["rows"]
    assert {"engine", "torch", f"{rows[0]['median_ms']:.4g}"} <= set(page.texts)
    assert any(f"{rows[0]['speedup']:.2f}×" in text for text in page.texts)
