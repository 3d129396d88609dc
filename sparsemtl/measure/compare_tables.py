"""The table of `sparsemtl compare` as Markdown, CSV, LaTeX and JSON, laid out as AdapMTL's Table 1.

Columns: per task its metrics and Δ_Ti; sparsity per component and overall; Δ_T. Arrows say which
way is better.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsemtl.measure.compare import Directions, Row, Stat


@dataclass(frozen=True)
class Column:
    """One column: which group it stands under, its title, and where its number comes from."""

    group: str
    title: str
    digits: int
    value: Any  # Row → Stat | None

    def text(self, row: Row) -> str:
        return _number(self.value(row), self.digits)


def columns(rows: Sequence[Row], directions: Directions) -> list[Column]:
    """In the order of the paper's table."""
    found = []
    for task, names in directions.items():
        for name, higher in names.items():
            title = f"{name} {'↑' if higher else '↓'}"
            found.append(Column(task, title, 4, lambda r, t=task, n=name: r.metrics[t][n]))
        found.append(Column(task, "Δ % ↑", 2, lambda r, t=task: r.delta.get(t)))
    for part in _components(rows):
        found.append(Column("sparsity %", part, 2, lambda r, p=part: _percent(r.components.get(p))))
    found.append(Column("sparsity %", "overall", 3, lambda r: _percent(r.zeros)))
    found.append(Column("", "Δ_T % ↑", 2, lambda r: r.overall_delta))
    return found


def _components(rows: Sequence[Row]) -> list[str]:
    """Those of the pruned rows: a row of other components, single-task, leaves them blank."""
    pruned = [r for r in rows if r.sparsity is not None] or list(rows)
    return list(dict.fromkeys(name for row in pruned for name in row.components))


def _percent(stat: Stat | None) -> Stat | None:
    if stat is None:
        return None
    return Stat(100.0 * stat.mean, None if stat.std is None else 100.0 * stat.std)


def _number(stat: Stat | None, digits: int) -> str:
    if stat is None or math.isnan(stat.mean):
        return "-"
    spread = "" if stat.std is None else f" ± {stat.std:.{digits}f}"
    return f"{stat.mean:.{digits}f}{spread}"


def _label(row: Row) -> str:
    target = "" if row.sparsity is None else f" {100 * row.sparsity:g} %"
    lost = f" ({len(row.failed)} of {len(row.failed) + len(row.seeds)} runs missing)"
    return row.method + target + (lost if row.failed else "")


def markdown(rows: Sequence[Row], directions: Directions) -> str:
    """One table per group of columns: a single one would be too wide to read."""
    texts = []
    for group, inside in _groups(columns(rows, directions)).items():
        lines = [
            "| method | " + " | ".join(c.title for c in inside) + " |",
            "|---|" + "---:|" * len(inside),
        ]
        lines += [f"| {_label(r)} | " + " | ".join(c.text(r) for c in inside) + " |" for r in rows]
        texts.append(f"**{group}**\n\n" + "\n".join(lines))
    return "\n\n".join(texts) + "\n"


def _groups(found: Sequence[Column]) -> dict[str, list[Column]]:
    groups: dict[str, list[Column]] = {}
    for column in found:
        groups.setdefault(column.group or "overall", []).append(column)
    return groups


def csv_text(rows: Sequence[Row], directions: Directions) -> str:
    """One line per row; mean and std of each column."""
    found = columns(rows, directions)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [f"{c.group}/{c.title[:-2] if c.title[-1] in '↑↓' else c.title}" for c in found]
    titles = [n.strip("/") for n in names]
    writer.writerow(
        ["method", "requested", "seeds", *(f"{n} {k}" for n in titles for k in ("mean", "std"))]
    )
    for row in rows:
        cells: list[Any] = []
        for column in found:
            stat = column.value(row)
            cells += ["", ""] if stat is None else [stat.mean, "" if stat.std is None else stat.std]
        target = "" if row.sparsity is None else row.sparsity
        writer.writerow([row.method, target, " ".join(map(str, row.seeds)), *cells])
    return out.getvalue()


def latex(rows: Sequence[Row], directions: Directions) -> str:
    """A booktabs tabular; the groups are spanning headings, as in the paper."""
    found = columns(rows, directions)
    groups: list[tuple[str, int]] = []
    for column in found:
        if groups and groups[-1][0] == column.group:
            groups[-1] = (column.group, groups[-1][1] + 1)
        else:
            groups.append((column.group, 1))
    heads = " & ".join(f"\\multicolumn{{{n}}}{{c}}{{{_tex(name)}}}" for name, n in groups)
    lines = [
        "\\begin{tabular}{l" + "r" * len(found) + "}",
        "\\toprule",
        f" & {heads} \\\\",
        "method & " + " & ".join(_tex(c.title) for c in found) + " \\\\",
        "\\midrule",
        *(
            f"{_tex(_label(r))} & " + " & ".join(_tex(c.text(r)) for c in found) + " \\\\"
            for r in rows
        ),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


_TEX = {
    **{c: f"\\{c}" for c in "%&_#$"},
    **{"↑": "$\\uparrow$", "↓": "$\\downarrow$", "Δ": "$\\Delta$", "±": "$\\pm$", "^": "\\^{}"},
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def row_json(row: Row) -> dict[str, Any]:
    """Plain values; NaN becomes None where it is written."""

    def stat(value: Stat | None) -> dict[str, float | None] | None:
        return None if value is None else value._asdict()

    def nest(values: Mapping[str, Any]) -> dict[str, Any]:
        return {k: stat(v) if isinstance(v, Stat) else nest(v) for k, v in values.items()}

    return {
        "method": row.method,
        "requested": row.sparsity,
        "seeds": list(row.seeds),
        "failed_seeds": list(row.failed),
        "metrics": nest(row.metrics),
        "delta": {"overall": stat(row.overall_delta), "tasks": nest(row.delta)},
        "sparsity": {"overall": stat(row.zeros), "components": nest(row.components)},
        "seconds": stat(row.seconds),
    }
