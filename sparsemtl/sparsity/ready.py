"""S(W, α) that an optimizer has written already, kept for as long as it is true.

The proof is the versions that torch counts: of each weight and of θ. Whatever changes one of them
in place (a controller that shifts θ, a freeze, a loaded checkpoint) makes the values stale, and
the next forward computes them anew. Writes that torch does not count, through `.data` or numpy,
cannot be seen: change weights under `torch.no_grad()` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class ReadyGroup:
    """What one pass wrote for the weights of one group, in their order.

    values:   S(W, α), each like its weight, perhaps narrower
    nonzeros: [n] int64, live weights of each
    bitmasks: one bit per weight, see `ThresholdStats`
    """

    values: tuple[Tensor, ...]
    nonzeros: Tensor
    bitmasks: tuple[Tensor, ...]


class ReadyValues:
    """The groups of a model whose values are known."""

    def __init__(self) -> None:
        self._groups: dict[int, tuple[list[Stamp], ReadyGroup]] = {}

    def offer(
        self, group: int, weights: Sequence[Tensor], theta: Tensor, found: ReadyGroup
    ) -> None:
        """Keep what was written from these weights and this θ, as they are now."""
        self._groups[group] = ([Stamp.of(t) for t in (*weights, theta, *found.values)], found)

    def find(self, group: int, weights: Sequence[Tensor], theta: Tensor) -> ReadyGroup | None:
        """What was written from just these weights and this θ, unchanged since; else None."""
        if group not in self._groups:
            return None
        stamps, found = self._groups[group]
        now = (*weights, theta, *found.values)
        if len(stamps) != len(now) or not all(map(Stamp.fits, stamps, now)):
            del self._groups[group]  # it will never be true again
            return None
        return found

    def clear(self) -> None:
        self._groups.clear()

    # A copy has weights of its own, and a file has none: neither carries the values along.

    def __deepcopy__(self, memo: Any) -> ReadyValues:
        return ReadyValues()

    def __reduce__(self) -> tuple[type[ReadyValues], tuple[()]]:
        return ReadyValues, ()


@dataclass(frozen=True)
class Stamp:
    """One tensor at one moment. The address is there because `.data =` leaves the version alone."""

    tensor: Tensor
    version: int
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> Stamp:
        return cls(tensor, tensor._version, tensor.data_ptr())

    def fits(self, tensor: Tensor) -> bool:
        return (
            tensor is self.tensor
            and tensor._version == self.version
            and tensor.data_ptr() == self.address
        )
