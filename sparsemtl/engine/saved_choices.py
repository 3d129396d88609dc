"""What was chosen for an engine, kept in its plan file: on the same machine nothing is timed again.

`choices` of plan.json is a list of {"machine", "inputs", "selection"}: the machine as
`choices.machine` names it, threads and instruction set included, the inputs' shapes, and
`Selection.state`. A reader takes them as a proposal: forms are exact whatever was chosen, and a
selection that does not fit the graph is made anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsemtl.engine.selection import Selection

Shapes = tuple[tuple[int, ...], ...]
Choices = dict[tuple[str, Shapes], Selection]

MOST = 64  # selections of one file
_MOST_AXES = 64


def to_json(choices: Mapping[tuple[str, Shapes], Selection]) -> list[dict[str, Any]]:
    """As plain data; of too many the latest."""
    return [
        {"machine": machine, "inputs": [list(shape) for shape in shapes], "selection": s.state()}
        for (machine, shapes), s in list(choices.items())[-MOST:]
    ]


def from_json(value: Any) -> Choices:
    """raises: ValueError for what `to_json` never wrote"""
    if not isinstance(value, list) or len(value) > MOST:
        raise ValueError(f"Expected 'choices' to be a list of at most {MOST}")
    found: Choices = {}
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("machine"), str):
            raise ValueError("Expected a machine, inputs and a selection in 'choices'")
        shapes = item.get("inputs")
        if not isinstance(shapes, list) or not all(_is_shape(shape) for shape in shapes):
            raise ValueError("Expected shapes of inputs in 'choices'")
        if not isinstance(item.get("selection"), dict):
            raise ValueError("Expected a selection in 'choices'")
        key = item["machine"], tuple(tuple(shape) for shape in shapes)
        found[key] = Selection.from_state(item["selection"])
    return found


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MOST_AXES
        and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    )
