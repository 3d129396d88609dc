"""Rows, tables and verdicts of a comparison, from summaries made by hand."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from sparsemtl.measure.compare import Cell, Stat, check_grid, rows_of, verdict, why_no_delta
from sparsemtl.measure.compare_tables import csv_text, latex, markdown, row_json

# AdapMTL, Table 1, segmentation: dense and AdapMTL; mIoU and pixel accuracy.
DIRECTIONS = {"seg": {"miou": True, "pacc": True}, "depth": {"abs_err": False}}
DENSE = {"seg": {"miou": 25.54, "pacc": 57.91}, "depth": {"abs_err": 0.5}}
ADAPMTL = {"seg": {"miou": 26.28, "pacc": 58.29}, "depth": {"abs_err": 0.6}}


def summary(metrics, sparsity=0.0, **components):
    parts = components or {"backbone": sparsity}
    return {
        "metrics": metrics,
        "sparsity": {"overall": sparsity, "components": parts},
        "seconds": 10.0,
    }


def grid():
    cells = [Cell("dense", None, s) for s in (0, 1)]
    cells += [Cell(m, 0.9, s) for m in ("adapmtl", "rigl") for s in (0, 1)]
    better = {"seg": {"miou": 30.0, "pacc": 58.0}, "depth": {"abs_err": 0.4}}
    found = {
        cells[0]: summary(DENSE),
        cells[1]: summary(DENSE),
        cells[2]: summary(ADAPMTL, 0.9),
        cells[3]: summary({**ADAPMTL, "depth": {"abs_err": 0.4}}, 0.9),
        cells[4]: summary(better, 0.9),
    }
    return cells, found


def test_delta_is_equation_7_on_the_papers_own_row():
    cells, found = grid()
    rows = {r.method: r for r in rows_of(cells, found, DIRECTIONS, "dense")}
    miou, pacc = 100 * 0.74 / 25.54, 100 * 0.38 / 57.91  # +2.90 % and +0.66 %
    assert rows["adapmtl"].delta["seg"].mean == pytest.approx((miou + pacc) / 2)
    printed = {r.method: r for r in rows_of(cells, found, DIRECTIONS, "dense", "sum")}
    assert printed["adapmtl"].delta["seg"].mean == pytest.approx(3.55, abs=0.005)  # as printed
    assert rows["adapmtl"].delta["depth"].mean == pytest.approx(0.0)  # -20 % and +20 %
    assert rows["adapmtl"].delta["depth"].std == pytest.approx(math.sqrt(800))
    assert rows["adapmtl"].overall_delta.mean == pytest.approx((miou + pacc) / 4)
    assert rows["dense"].overall_delta == Stat(0.0, 0.0)


def test_missing_seeds_are_told_and_one_seed_has_no_spread():
    cells, found = grid()
    row = rows_of(cells, found, DIRECTIONS, "dense")[-1]
    assert (row.method, row.seeds, row.failed) == ("rigl", (0,), (1,))
    assert row.metrics["seg"]["miou"] == Stat(30.0, None)
    assert "rigl 90 % (1 of 2 runs missing)" in markdown([row], DIRECTIONS)


def test_the_verdict_names_what_adapmtl_loses():
    cells, found = grid()
    (text,) = verdict(rows_of(cells, found, DIRECTIONS, "dense"), DIRECTIONS)
    assert "does not win 5 of 6 columns" in text
    assert "seg miou 26.28 against 30 (rigl)" in text
    assert "depth abs_err 0.5 against 0.4 (rigl, within one std)" in text
    assert "pacc" not in text  # 58.29 is ahead of 58.0


def test_tables_agree_with_each_other():
    cells, found = grid()
    rows = rows_of(cells, found, DIRECTIONS, "dense")
    table = list(csv.DictReader(io.StringIO(csv_text(rows, DIRECTIONS))))
    assert [line["method"] for line in table] == ["dense", "adapmtl", "rigl"]
    assert float(table[1]["seg/miou mean"]) == 26.28
    assert float(table[1]["sparsity %/overall mean"]) == pytest.approx(90.0)
    assert "26.2800 ± 0.0000" in markdown(rows, DIRECTIONS)
    text = latex(rows, DIRECTIONS)
    assert text.count("\\\\") == 2 + len(rows)
    assert "90 \\%" in text
    assert "\\multicolumn{3}{c}{seg}" in text
    plain = json.loads(json.dumps([row_json(row) for row in rows]))
    assert plain[1]["metrics"]["seg"]["miou"] == {"mean": 26.28, "std": 0.0}


def test_a_network_per_task_leaves_the_components_blank():
    cells, found = grid()
    single = Cell("single-task", None, 0)
    found[single] = summary(DENSE, 0.0, **{"network:seg": 0.0, "network:depth": 0.0})
    rows = rows_of([*cells, single], found, DIRECTIONS, "dense")
    assert "| single-task | - | 0.000 |" in markdown(rows, DIRECTIONS).splitlines()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((["rigl", "rigl"], [0.9], [0]), "each of methods once, got rigl twice"),
        ((["rigl"], [0.9], [1, 2, 1]), "each of seeds once, got 1 twice"),
        ((["rigl"], [0.9, 0.9], [1]), "each of sparsity once, got 0.9 twice"),
        ((["rigl"], [], [1]), "at least one of sparsity"),
        ((["rigl"], [1.0], [1]), r"sparsity in \(0, 1\), got 1.0"),
        ((["rigl"], [0.5], [-1]), "seeds >= 0"),
    ],
)
def test_bad_grids_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        check_grid(*grid)


def test_no_reference_no_delta():
    cells, found = grid()
    assert why_no_delta(found, DIRECTIONS, "dense") is None
    zero = {cells[0]: summary({**DENSE, "depth": {"abs_err": 0.0}})}
    assert "depth/abs_err to be finite and not 0" in why_no_delta(zero, DIRECTIONS, "dense")
    assert rows_of(cells[:1], zero, DIRECTIONS, "dense")[0].overall_delta is None
    assert why_no_delta(found, DIRECTIONS, "single-task").startswith(
        "no Δ: no run of 'single-task'"
    )
    rows = rows_of(cells, found, DIRECTIONS, "single-task")
    assert [r.overall_delta for r in rows] == [None] * 3
    assert "26.2800 ± 0.0000 | 58.2900 ± 0.0000 | - |" in markdown(rows, DIRECTIONS)


def test_cells_have_folders_of_their_own():
    names = [
        Cell(m, 0.9, 0).name
        for m in ("snip", "snip+structure=vector(8)", "snip+structure=vector(4)", "snip+batches=4")
    ]
    assert len(set(names)) == 4
    assert Cell("dense", None, 3).name == "dense-seed3"
    assert Cell("rigl", 0.995, 3).name == "rigl-99.5-seed3"
