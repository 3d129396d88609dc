"""How an op chooses who computes it.

An op holds an ordered tuple of backends. Each says by `why_not` whether it can take these very
arguments, in words, and the first that can runs. A backend asked for by name, through
`use_backend` or the variable SPARSEMTL_BACKEND, never falls back: where it cannot run,
`BackendUnavailable` names the reason and what could run instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("triton", "cuda", "native", "reference")  # every name that any op may use

_VARIABLE = "SPARSEMTL_BACKEND"
_requested: ContextVar[str | None] = ContextVar("sparsemtl_backend", default=None)
_ops: dict[str, Op] = {}
_log = logging.getLogger(__name__)


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here, or cannot take these arguments."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an op.

    forward:  takes what the op takes
    backward: takes what the op's backward pass takes; None for an op without one
    why_not:  called with the forward's arguments, or with none to ask about the machine alone;
              returns None if the backend can run, else the reason in words
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None
    why_not: Callable[..., str | None]

    def __post_init__(self) -> None:
        if self.name not in BACKENDS:
            raise ValueError(f"Backend: expected name to be one of {BACKENDS}, got {self.name!r}")


class Reasons(dict[str, "str | None"]):
    """Backend name -> None where it can run, else why not; in the order of preference.

    `str` of it is a table for people.
    """

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        lines = [f"{name:<{width}}  {reason or 'usable'}" for name, reason in self.items()]
        return "\n".join(lines)

    @property
    def usable(self) -> list[str]:
        """Names of the backends that can run, best first."""
        return [name for name, reason in self.items() if reason is None]


class Op:
    """A named operation with its ordered backends; creating one enters it into `all_ops()`."""

    def __init__(self, name: str, backends: tuple[Backend, ...]) -> None:
        if name in _ops:
            raise ValueError(f"Op: expected a new name, got {name!r}, which exists")
        self.name = name
        self.backends = backends
        self._by_name = {backend.name: backend for backend in backends}
        self._logged: set[str] = set()
        _ops[name] = self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of this op's backends, in the order of preference."""
        return tuple(self._by_name)

    def choose(self, *args: Any) -> Backend:
        """Return the backend for these arguments.

        raises: BackendUnavailable if a backend was asked for by name and cannot take them
                ValueError if SPARSEMTL_BACKEND holds an unknown name
        """
        name = requested_backend()
        if name is not None:
            return self._named(name, args)
        for backend in self.backends:
            if backend.why_not(*args) is None:
                if backend.name not in self._logged:
                    self._log_once(backend.name, "first that can run")
                return backend
        raise BackendUnavailable(f"{self.name} cannot run here:\n{self.explain(*args)}")

    def explain(self, *args: Any) -> Reasons:
        """Why each backend would not run: for these arguments, or for this machine if none given.

        `print(SOFT_THRESHOLD.explain([weight], alpha))` shows a line for each backend.
        """
        return Reasons({backend.name: backend.why_not(*args) for backend in self.backends})

    def _named(self, name: str, args: tuple[Any, ...]) -> Backend:
        backend = self._by_name.get(name)
        reason = f"it has no {name} backend" if backend is None else backend.why_not(*args)
        if backend is None or reason is not None:
            usable = ", ".join(self.explain(*args).usable) or "none"
            raise BackendUnavailable(
                f"{self.name} cannot run on {name!r}: {reason}. Usable here: {usable}. "
                "Choose one of these, or leave the backend open"
            )
        self._log_once(name, "asked for by name")
        return backend

    def _log_once(self, name: str, why: str) -> None:
        if name not in self._logged:
            self._logged.add(name)
            _log.info("%s runs on %s (%s)", self.name, name, why)


def all_ops() -> dict[str, Op]:
    """Return every op by name, for `sparsemtl info` and the layout test."""
    return dict(_ops)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op inside the block on the named backend, without falling back.

    name:   "triton", "cuda", "native", "reference"; None for what holds outside every block
    raises: ValueError for another name, TypeError for what is not a name

    Holds for this thread and this asyncio task. A backward pass uses the backend of its forward.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"use_backend: Expected name to be a str, got {type(name).__name__}")
    token = _requested.set(name if name is None else _known(name, "use_backend"))
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str | None:
    """Return the backend asked for by `use_backend`, else by SPARSEMTL_BACKEND, else None."""
    name = _requested.get()
    if name is None:
        name = os.environ.get(_VARIABLE)
        name = _known(name, _VARIABLE) if name else None
    return name


def _known(name: str, who: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{who}: Expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def through_torch(*tensors: Tensor) -> bool:
    """Whether a call must pass torch's dispatcher: compile, export, FLOP counting, subclasses.

    Everywhere else the backend is called directly, which saves some ten microseconds a call.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._len_torch_dispatch_stack() > 0:  # FakeTensorMode, FlopCounterMode
        return True
    return any(type(t) is not Tensor and type(t) is not torch.nn.Parameter for t in tensors)


def in_functorch() -> bool:
    """Whether a torch.func transform or forward-mode differentiation traces this call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether a gradient stands for many, as under `is_grads_batched`; it has no address."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


def require_reference(op: Op) -> None:
    """Allow what only plain torch can do, such as a torch.func transform.

    raises: BackendUnavailable if another backend was asked for by name
    """
    name = requested_backend()
    if name not in (None, "reference"):
        raise BackendUnavailable(
            f"{op.name} cannot run on {name!r}: a torch.func transform is active. "
            "Usable here: reference. Leave the backend open inside torch.func"
        )
