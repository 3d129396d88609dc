"""gpu.json as a table and a picture, written anew after each part of a run."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from bench.machine import text


def write(result: dict, folder: Path) -> None:
    """gpu.json, gpu.md and, where matplotlib is installed, gpu.png; each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "gpu.json", json.dumps(result, indent=1).encode())
    _replace(folder / "gpu.md", markdown(result).encode())
    if importlib.util.find_spec("matplotlib") is not None and speedups(result):
        picture(result, folder / "gpu.png")


def speedups(result: dict) -> list[tuple[str, float]]:
    """(case, speed-up over the best dense candidate), in the order of the run."""
    found = []
    for section, rows in result["rows"].items():
        for case, row in rows.items():
            passes = {case: row} if "speedup" in row else row
            for name, entry in passes.items():
                if isinstance(entry, dict) and "speedup" in entry:
                    label = case if name == case else f"{case}, {name}"
                    found.append((f"{section} {label}", entry["speedup"]))
    return found


def markdown(result: dict) -> str:
    """The machine line, the parts that ran, and a row for each case."""
    lines = ["# GPU run", "", text(result["machine"]), ""]
    if "passed" in result:
        verdict = "passed" if result["passed"] else "FAILED: see the parts"
        lines += [f"The run {verdict}, in {result['seconds']} s.", ""]
    lines += ["| part | state | | at s |", "|---|---|---|---|"]
    for name, part in result["parts"].items():
        reason = part["reason"].replace("|", "/")
        lines.append(f"| {name} | {part['state']} | {reason} | {part['at']} |")
    lines += ["", "| case | candidate | median ms | quartiles |", "|---|---|---|---|"]
    for section, rows in result["rows"].items():
        for case, row in rows.items():
            lines += _rows(f"{section} {case}", row)
    lines += ["", "| case | speed-up over the best dense candidate |", "|---|---|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in speedups(result)]
    return "\n".join(lines) + "\n"


def _rows(case: str, row: dict) -> list[str]:
    lines = []
    for name, entry in row.items():
        if isinstance(entry, dict) and "ms" in entry:
            quartiles = f"{entry['low']:.3f} to {entry['high']:.3f}"
            lines.append(f"| {case} | {name} | {entry['ms']:.3f} | {quartiles} |")
        elif isinstance(entry, dict) and "error" in entry:
            lines.append(f"| {case} | {name} | not run | {entry['error'].replace('|', '/')} |")
        elif isinstance(entry, dict):
            lines += _rows(f"{case}, {name}", entry)
        else:
            shown = f"{entry:.3g}" if isinstance(entry, (int, float)) else str(entry)
            lines.append(f"| {case} | {name} | {shown} | |")
    return lines


def picture(result: dict, path: Path) -> None:
    """Speed-ups as bars, with the machine as the title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = speedups(result)[::-1]
    figure = Figure(figsize=(9, 1 + 0.28 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([name for name, _ in found], [value for _, value in found], color="#4c72b0")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("speed-up over the best dense candidate of the same run")
    line = result["machine"]
    shown = {key: line[key] for key in ("gpu", "torch", "cuda", "revision") if key in line}
    axes.set_title(text(shown), fontsize=9)
    FigureCanvasAgg(figure).print_png(str(path))


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
