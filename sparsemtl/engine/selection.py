"""What each layer of a graph runs on, as plain data: `select.py` chooses, a file may keep it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsemtl.engine.executors.forms import MODES, Form
from sparsemtl.errors import unknown_choice
from sparsemtl.ops.pattern import STRUCTURES

DENSE = "dense"
WIDTHS = (1, 2, 3, 4, 6, 8, 12)  # registers of pixels in a tile, see cpu/sparse_conv2d.inc.h


@dataclass(frozen=True)
class LayerChoice:
    """What one layer runs on and why.

    density:    share of weights that are not zero
    candidates: name → seconds, measured alone; empty where nothing was measured
    choice:     one of them: "dense", or "structure/mode/vectors" of a sparse form
    """

    layer: str
    density: float
    candidates: dict[str, float]
    choice: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """Choices by layer, and whether torch runs the whole graph.

    apart: convolutions of one input and geometry that are faster each by itself
    """

    layers: dict[str, LayerChoice] = field(default_factory=dict)
    whole: str = "native"
    apart: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """As plain data for a file."""
        return {
            "whole": self.whole,
            "apart": list(self.apart),
            "layers": {
                name: [c.layer, c.density, c.candidates, c.choice, c.reason]
                for name, c in self.layers.items()
            },
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Selection:
        """raises: ValueError for what `state` never wrote."""
        try:
            layers = {
                str(name): LayerChoice(
                    str(c[0]),
                    _share(c[1]),
                    {str(k): _seconds(v) for k, v in c[2].items()},
                    str(c[3]),
                    str(c[4]),
                )
                for name, c in state["layers"].items()
            }
            whole, apart = state["whole"], tuple(str(name) for name in state["apart"])
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"Selection: Expected layers, apart and whole, got {error!r}"
            ) from error
        if whole not in ("native", DENSE):
            raise ValueError(f"Selection: {unknown_choice('whole', whole, ('native', DENSE))}")
        for choice in layers.values():
            for name in (choice.choice, *choice.candidates):
                parse_form(name)
        return cls(layers, whole, apart)


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"Expected seconds, got {value!r:.40}")
    return float(value)


def _share(value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"Expected a density in [0, 1], got {value!r:.40}")
    return float(value)


def parse_form(name: str) -> tuple[str, str, int] | None:
    """Structure, mode and vectors of a form's name; None for "dense".

    raises: ValueError for another name
    """
    if name == DENSE:
        return None
    parts = name.split("/")
    good = len(parts) == 3 and parts[1] in MODES and parts[2] in {str(w) for w in WIDTHS}
    if not good or parts[0] not in ("element", *STRUCTURES):
        raise ValueError(f"Selection: Expected structure/mode/vectors, got {name!r}")
    return parts[0], parts[1], int(parts[2])


def form_name(form: Form) -> str:
    """As `parse_form` reads it."""
    return f"{form.weight.structure}/{form.mode}/{form.vectors}"
