"""Error texts and types that every room shares. Imports nothing of ours."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DivergedError(RuntimeError):
    """Training met NaN or inf: the message names task, step and last good checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or does not fit; the message names the file."""


class EngineFileError(ValueError):
    """A saved engine cannot be read; the message names the folder and what is wrong."""


class GraphError(ValueError):
    """An engine's graph contradicts itself; the message names the node or the value."""


def unknown_choice(what: str, got: object, choices: Iterable[str]) -> str:
    """«Expected method in [...], got 'x'. Did you mean 'y'?»"""
    names = list(choices)
    close = difflib.get_close_matches(str(got), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"Expected {what} to be one of {names}, got {got!r}.{hint}"
