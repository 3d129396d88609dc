"""Where values stand in the native executor's arena, and how much of it is needed.

A plane may have zeros around its pixels, which stand in memory once and serve both neighbours: one
gap of columns ends each row, one gap of rows ends each plane, and a lead of both comes first. Steps
write pixels only, so the zeros of an arena stay zeros: memory of one geometry is given only to
values of the same, and memory without gaps to any value without.

A buffer is what is placed as a whole: a value, or several that share memory because one is computed
into another's place, or stand side by side as the channels of a concatenation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

_LINE = 16  # floats of a cache line
_PAGE = 1024  # planes a multiple of this apart meet in the same lines of the L1 cache
_TILE = 208  # floats that the last tile of a convolution may read beyond the last pixel


def _round(floats: int) -> int:
    return -(-floats // _LINE) * _LINE


@dataclass(frozen=True)
class View:
    """View of csrc/engine/steps.h: shape [B, C, H, W] and strides in floats."""

    slot: int
    offset: int
    shape: tuple[int, int, int, int]
    image: int
    plane: int
    pitch: int

    @property
    def numbers(self) -> list[int]:
        return [self.slot, self.offset, *self.shape, self.image, self.plane, self.pitch]

    @property
    def floats(self) -> int:
        return prod(self.shape)

    def flat(self) -> View:
        """All of it as one row; of a view without gaps only."""
        assert not self.has_gaps
        return View(self.slot, self.offset, (1, 1, 1, self.floats), 0, 0, self.floats)

    @property
    def has_gaps(self) -> bool:
        _, channels, height, width = self.shape
        dense = contiguous(0, 0, self.shape)
        return (
            (height > 1 and self.pitch != width)
            or (channels > 1 and self.plane != dense.plane)
            or (self.shape[0] > 1 and self.image != dense.image)
        )

    def stretched(self, shape: tuple[int, int, int, int]) -> View | None:
        """Broadcast to a shape, rows to a single number each; None where that cannot be said."""
        strides = [self.image, self.plane, self.pitch]
        for axis in range(3):
            if self.shape[axis] != shape[axis]:
                if self.shape[axis] != 1:
                    return None
                strides[axis] = 0
        if self.shape[3] not in (1, shape[3]):
            return None
        return View(self.slot, self.offset, (*shape[:3], self.shape[3]), *strides)


def contiguous(slot: int, offset: int, shape: tuple[int, int, int, int]) -> View:
    _, channels, height, width = shape
    plane = height * width
    return View(slot, offset, shape, channels * plane, plane, width)


def four(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A shape of at most four axes with ones at its end."""
    first, second, third, fourth = (*shape, *[1] * (4 - len(shape)))
    return first, second, third, fourth


@dataclass(eq=False)
class Buffer:
    """Planes [B, C, H, W] in the arena, or a tensor of the caller.

    gaps:  rows and columns of zeros between planes and rows
    kind:  what else memory must have in common to be used in turn; phases of planes differ in size
    first, last: the steps that write and read it first and last
    packed: without anything between planes, for what is no image
    slot:  0 for the arena; else the caller's tensor, without gaps
    """

    shape: tuple[int, int, int, int]
    gaps: tuple[int, int] = (0, 0)
    kind: tuple[object, ...] = ()
    packed: bool = False
    slot: int = 0
    first: int = -1
    last: int = -1
    offset: int = field(default=-1, init=False)

    def touch(self, step: int) -> None:
        self.first = step if self.first < 0 else self.first
        self.last = max(self.last, step)

    @property
    def pitch(self) -> int:
        return self.shape[3] + self.gaps[1]

    @property
    def plane(self) -> int:
        floats = (self.shape[2] + self.gaps[0]) * self.pitch
        if self.slot or self.packed:
            return floats
        floats = _round(floats)
        return floats + _LINE if floats % _PAGE == 0 else floats

    @property
    def lead(self) -> int:
        return _round(self.gaps[0] * self.pitch + self.gaps[1])

    @property
    def floats(self) -> int:
        """With all zeros, and what a tile may read beyond its end."""
        planes = self.shape[0] * self.shape[1]
        return _round(self.lead + planes * self.plane + self.lead + _TILE)

    @property
    def geometry(self) -> tuple[object, ...]:
        """Buffers that agree in it can use the same memory in turn."""
        if self.gaps == (0, 0) and not self.kind:
            return ()
        return (self.shape[2:], self.gaps, self.kind)

    def view(self, channel: int = 0, channels: int | None = None) -> View:
        """Some of its channels, all by default."""
        batch, all_channels, height, width = self.shape
        count = all_channels if channels is None else channels
        offset = channel * self.plane + (0 if self.slot else self.offset + self.lead)
        image = all_channels * self.plane
        return View(self.slot, offset, (batch, count, height, width), image, self.plane, self.pitch)


def place(buffers: list[Buffer]) -> int:
    """Give each buffer of the arena its offset; returns the floats of the arena.

    Buffers that are not needed at the same time share memory, if zeros stand in the same places.
    """
    slots: list[tuple[tuple[object, ...], int, list[Buffer]]] = []
    free: list[int] = []
    sizes: list[int] = []
    running: list[tuple[int, int]] = []  # last step, slot
    for buffer in sorted((b for b in buffers if b.slot == 0), key=lambda b: b.first):
        for end in [r for r in running if r[0] < buffer.first]:
            running.remove(end)
            free.append(end[1])
        fitting = [i for i in free if slots[i][0] == buffer.geometry]
        # The smallest that is large enough; failing that the largest, which grows.
        large = [i for i in fitting if sizes[i] >= buffer.floats]
        if large:
            chosen = min(large, key=lambda i: sizes[i])
        elif fitting:
            chosen = max(fitting, key=lambda i: sizes[i])
        else:
            chosen = len(slots)
            slots.append((buffer.geometry, 0, []))
            sizes.append(0)
        if chosen in free:
            free.remove(chosen)
        sizes[chosen] = max(sizes[chosen], buffer.floats)
        slots[chosen][2].append(buffer)
        running.append((buffer.last, chosen))
    offset = 0
    for size, (_, _, members) in zip(sizes, slots, strict=True):
        for buffer in members:
            buffer.offset = offset
        offset += size
    return offset
