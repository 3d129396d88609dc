"""Why a model could not be captured, in words that name its own line and the way out."""

from __future__ import annotations

import os
import traceback

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep

_WAY_OUT = (
    "Choose between tensors with torch.where, decide before compile (an argument of the "
    "constructor), or compile the part before and the part after it"
)


class CaptureError(ValueError):
    """A model cannot become a static graph; the message names the line and the way out."""


def explain_failure(error: BaseException) -> CaptureError | None:
    """What to raise in place of an error of torch.export; None where another try may help."""
    frame = _own_frame(error)
    if isinstance(error, GuardOnDataDependentSymNode):
        return CaptureError(
            f"compile: Expected no control flow that depends on tensor values, got it at "
            f"{_place(frame)}. {_WAY_OUT}"
        )
    if isinstance(error, RuntimeError) and "is not supported for tensor subclasses" in str(error):
        return CaptureError(
            f"compile: Expected a forward pass of torch operations, got a way out of torch at "
            f"{_place(frame)}. Express it with torch operations, or do it after the engine"
        )
    return None


def cannot_export(error: BaseException) -> CaptureError:
    """For whatever else torch.export refuses."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CaptureError(
        f"compile: Expected a model that torch.export can capture, got «{reason}» at "
        f"{_place(_own_frame(error))}. Rewrite that line with torch operations on tensors of fixed "
        "rank, or compile the part before and the part after it"
    )


def from_the_model(error: BaseException) -> bool:
    """Whether the model's own code raised it, as for an input that it does not take."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and not _foreign(frames[-1])


def depends_on_values(stack: str | None, what: str) -> CaptureError:
    """For a value whose shape depends on values.   stack: torch's stack trace of the node"""
    return CaptureError(
        f"compile: Expected no shape that depends on tensor values, got one ({what}) at "
        f"{last_lines(stack)}. {_WAY_OUT}"
    )


def last_lines(stack: str | None) -> str:
    """The innermost line of torch's stack trace of a node."""
    lines = [line.strip() for line in (stack or "").splitlines() if line.strip()]
    return " ".join(lines[-2:]) or "an unknown line"


def _own_frame(error: BaseException) -> traceback.FrameSummary | None:
    own = [f for f in traceback.extract_tb(error.__traceback__) if not _foreign(f)]
    return own[-1] if own else None


def _foreign(frame: traceback.FrameSummary) -> bool:
    return frame.filename.startswith((_TORCH, _OURS)) or frame.filename == "<string>"


def _place(frame: traceback.FrameSummary | None) -> str:
    if frame is None:
        return "an unknown line"
    return f"{frame.filename}:{frame.lineno} in {frame.name}: `{(frame.line or '').strip()}`"
