"""Which weights of a convolution are alive, in the form that the kernels walk.

A Pattern is built from a weight [K, C / groups, kh, kw] by `pack_pattern` and holds

- one bit per weight (per vector of V output channels for the structure vector(V)),
- the list of nonzeros by output channel, for the forward pass,
- the transposed list by input channel, for the input gradient; built when first asked for,
- for vectors, the list by single weights as well, for the weight gradient.

Lists are blocked: the inputs of a block's columns, (tap, input channel) pairs, stay in the L1 cache
while every output channel reads them. Blocks end at taps where channels are many, so that a tile
of pixels whose taps read only padding skips their blocks.

K, C: output, input channels. T: taps, kh · kw. Z: nonzeros.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsemtl.ops.availability import native_module, why_not_native
from sparsemtl.ops.packed_list import PackedList, pack_list

_MOST_CALLS = 64
STRUCTURES = {"element": 1, "vector(4)": 4, "vector(8)": 8, "vector(16)": 16}


class Pattern:
    """The live weights of one convolution and their packed lists.

    shape:     (K, C / groups, kh, kw) of the weight
    groups:    of the convolution
    device:    of the weight
    structure: "element", or "vector(V)": V output channels share each live position
    nonzeros:  live weights; those of a live vector all count, zeros among them included

    keep:      the mask that the pattern was given, or None if it is where the weight is not zero

    A pattern without a mask follows its weight: `update` compares bits and repacks only if they
    differ. A pattern with a mask is fixed, and `update` refuses a weight that it does not cover,
    unless the weight is a master weight, whose values outside the mask are not looked at.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        groups: int = 1,
        structure: str = "element",
        keep: Tensor | None = None,
        master: bool = False,
    ) -> None:
        _check(weight, groups, structure, keep)
        self.shape = tuple(weight.shape)
        self.groups = groups
        self.structure = structure
        self.vector = STRUCTURES[structure]
        self.keep = None if keep is None else keep.detach().to(weight.device).contiguous()
        self.master = master
        self.device = weight.device
        self._native = weight.is_cpu and why_not_native() is None
        self._lists: dict[str, PackedList] = {}
        self._fresh: set[str] = set()  # lists that hold the values of the present weight
        # Of sparse_conv2d: native plans hold addresses of lists, so they go when those do.
        self.plans: dict[Hashable, tuple[bool, Any]] = {}
        self.calls: dict[Hashable, Any] = {}  # its arguments, once checked → their backend
        self._dense = _flat(weight)
        self._find(self._dense if keep is None else None)
        self._remember(weight)
        if keep is not None and not master:
            self._check_covered(self._dense)

    def __getstate__(self) -> dict[str, Any]:
        # Lists and plans hold addresses; a copy makes its own, and follows no tensor yet.
        fresh: dict[str, Any] = {
            "_lists": {},
            "_fresh": set(),
            "plans": {},
            "calls": {},
            "_weight": None,
            "_version": -1,
        }
        return {**self.__dict__, **fresh}

    def update(self, weight: Tensor) -> bool:
        """Follow a new weight of the same shape; return whether the pattern changed.

        raises: ValueError for a weight of another shape or device, or one that a given mask does
                not cover

        Values are copied when a kernel next needs them. A weight that is already followed and has
        not been written to since, as torch counts writes, costs nothing; what bypasses that count
        (`weight.data`, numpy) is not seen.
        """
        if self.follows(weight):
            return False
        _check(weight, self.groups, self.structure, None)
        if tuple(weight.shape) != self.shape:
            raise ValueError(
                f"Pattern: Expected weight to have shape {list(self.shape)}, for which the pattern "
                f"was built, got {list(weight.shape)}"
            )
        if weight.device != self.device:
            raise ValueError(
                f"Pattern: Expected weight to be on {self.device}, for which the pattern was "
                f"built, got {weight.device}"
            )
        dense = _flat(weight)
        changed = False
        if self.keep is not None:
            if not self.master:
                self._check_covered(dense)
        else:
            bits, _ = self._bits_of(dense, self.vector)
            changed = not torch.equal(bits, self._bits)
        self._dense = dense
        self._fresh.clear()
        self._remember(weight)
        if changed:
            self._find(dense)
        return changed

    def follows(self, weight: Tensor) -> bool:
        """Whether this tensor, or a whole view of it, was given last and not written to since."""
        owner = _owner(weight)
        same = owner is not None and self._weight is not None and self._weight() is owner
        return same and weight._version == self._version

    def remember_call(self, call: Hashable, backend: Any) -> None:
        """Note that these arguments were checked, and what computes them."""
        if len(self.calls) >= _MOST_CALLS:
            self.calls.clear()
        self.calls[call] = backend

    def mask(self) -> Tensor:
        """The live weights: bool, of the weight's shape."""
        if not self._native:
            return self._bits
        rows, channels, kh, kw = self.shape
        columns, vectors = channels * kh * kw, -(-(rows // self.groups) // self.vector)
        width = 64 * -(-columns // 64)
        alive = (self._bits[:, None] >> torch.arange(64, device="cpu")) & 1  # [words, 64]
        alive = alive.view(self.groups, vectors, 1, width)[..., :columns].bool()
        alive = alive.expand(-1, -1, self.vector, -1)
        alive = alive.reshape(self.groups, vectors * self.vector, columns)
        return alive[:, : rows // self.groups].reshape(self.shape).contiguous()

    def forward_list(self, *, whole: bool = False) -> PackedList:
        """Nonzeros by output channel; V of them at a time for vector(V).

        whole: all of an output channel's nonzeros together, for kernels that read x in place
        """
        return self._list("forward", self._bits, self.vector, whole=whole)

    def transposed_list(self, *, whole: bool = False) -> PackedList:
        """Nonzeros by input channel, for the input gradient."""
        return self._list("transposed", self._element_bits, 1, transposed=True, whole=whole)

    def element_list(self, *, whole: bool = False) -> PackedList:
        """Nonzeros by output channel, single weights whatever the structure."""
        if self.vector == 1:
            return self.forward_list(whole=whole)
        return self._list("element", self._element_bits, 1, whole=whole)

    def per_column(self, *, transposed: bool = False, vectors: bool = False) -> float:
        """Nonzeros (vectors of them) per column of a list: how often an input is read."""
        rows, channels, kh, kw = self.shape
        columns = (rows if transposed else self.groups * channels) * kh * kw
        return (self._count if vectors else self.nonzeros) / max(columns, 1)

    def spread(self, values: Tensor, packed: PackedList) -> Tensor:
        """Return a dense tensor of the weight's shape with one value at each nonzero, 0 elsewhere.

        values: [≥ Z] float32, in the order of `packed`
        """
        dense = torch.empty(self.shape, dtype=torch.float32, device="cpu")
        native_module().spread_values(
            values.data_ptr(),
            packed.sources.data_ptr(),
            packed.nonzeros,
            dense.data_ptr(),
            dense.numel(),
            torch.get_num_threads(),
        )
        return dense

    def _remember(self, weight: Tensor) -> None:
        owner = _owner(weight)
        self._weight = None if owner is None else weakref.ref(owner)
        self._version = -1 if owner is None else owner._version

    def _find(self, weight: Tensor | None) -> None:
        """Bits and counts from the weight, or from the mask; forget the lists."""
        self._bits, self._count = self._bits_of(weight, self.vector)
        self._element_bits, self.nonzeros = self._bits, self._count
        if self.vector > 1:  # every weight of a live vector
            self._element_bits, self.nonzeros = self._bits_of(self.mask(), 1)
        self.plans.clear()
        self._lists.clear()
        self._fresh.clear()

    def _bits_of(self, source: Tensor | None, vector: int) -> tuple[Tensor, int]:
        """One bit per position in 64-bit words; without native kernels for it, a bool each."""
        source = self.keep if source is None else source
        assert source is not None
        if not self._native:
            mask = live_mask(source, self.groups, vector)
            return mask, int(mask.sum())
        rows, channels, kh, kw = self.shape
        vectors = self.groups * -(-(rows // self.groups) // vector)
        words = vectors * -(-(channels * kh * kw) // 64)
        bits = torch.empty(words, dtype=torch.int64, device="cpu")
        is_mask = source.dtype is torch.bool
        count = native_module().pattern_bits(
            [self.groups, rows, channels, kh * kw, vector, False, False],
            0 if is_mask else source.data_ptr(),
            source.data_ptr() if is_mask else 0,
            bits.data_ptr(),
            torch.get_num_threads(),
        )
        return bits, count

    def _check_covered(self, weight: Tensor) -> None:
        bits, _ = self._bits_of(weight, self.vector)
        if bool((bits & ~self._bits).any()):
            raise ValueError(
                "Pattern: Expected weight to be zero wherever the pattern's mask is, "
                "got nonzeros outside it"
            )

    def _list(
        self,
        name: str,
        bits: Tensor,
        vector: int,
        *,
        transposed: bool = False,
        whole: bool = False,
    ) -> PackedList:
        if whole:
            name += " whole"
        packed = self._lists.get(name)
        if packed is None:
            count = self._count if vector == self.vector else self.nonzeros
            packed = pack_list(
                self.shape,
                self.groups,
                self._dense,
                bits,
                count,
                vector=vector,
                transposed=transposed,
                whole=whole,
            )
            self._lists[name] = packed
        elif name not in self._fresh:
            packed.refresh(self._dense)
        self._fresh.add(name)
        return packed


def live_vectors(weight: Tensor, groups: int, vector: int) -> tuple[int, int]:
    """How many vectors of output channels have a nonzero, and how many last ones of a group.

    weight: [K, C / groups, kh, kw] float32, contiguous, on the CPU   vector: channels of a vector
    """
    rows, channels, kh, kw = weight.shape
    if why_not_native() is not None or weight.numel() == 0:
        mask = live_mask(weight, groups, vector).reshape(groups, -(-(rows // groups) // vector), -1)
        return int(mask.sum()), int(mask[:, -1:].sum())
    vectors, words = -(-(rows // groups) // vector), -(-(channels * kh * kw) // 64)
    bits = torch.empty(groups, vectors, words, dtype=torch.int64)
    count = native_module().pattern_bits(
        [groups, rows, channels, kh * kw, vector, False, False],
        weight.data_ptr(),
        0,
        bits.data_ptr(),
        torch.get_num_threads(),
    )
    last = np.unpackbits(bits[:, -1].contiguous().numpy().view(np.uint8))
    return count, int(last.sum())


def live_mask(source: Tensor, groups: int, vector: int) -> Tensor:
    """What is alive, in plain torch: bool of the shape of source, a weight or a mask."""
    alive = source != 0
    if vector > 1 and source.numel() > 0:
        rows = source.shape[0] // groups
        grouped = alive.reshape(groups, rows, -1)
        for first in range(0, rows, vector):
            block = grouped[:, first : first + vector]
            block |= block.any(1, keepdim=True)
        alive = grouped.reshape(source.shape)
    return alive


def _owner(weight: Tensor) -> Tensor | None:
    """The tensor whose count of writes tells whether the weight is still the same, if any does."""
    if weight.is_inference():
        return None
    base = weight._base if weight._is_view() else weight
    if base is None or not weight.is_contiguous() or not base.is_contiguous():
        return None
    return base if base.numel() == weight.numel() else None


def _flat(weight: Tensor) -> Tensor:
    return weight.detach().resolve_neg().to(torch.float32).contiguous()


def _check(weight: Any, groups: int, structure: str, keep: Any) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"pack_pattern: Expected weight to be a Tensor, got {type(weight).__name__}"
        )
    if not weight.is_floating_point() or weight.layout is not torch.strided:
        raise TypeError(
            "pack_pattern: Expected weight to be a strided floating tensor, "
            f"got {weight.layout} {weight.dtype}"
        )
    if weight.is_meta:
        raise ValueError("pack_pattern: Expected weight to hold values, got one on meta")
    if weight.dim() != 4:
        raise ValueError(
            "pack_pattern: Expected weight to have 4 axes [K, C / groups, kh, kw], "
            f"got shape {list(weight.shape)}"
        )
    if weight.numel() >= 1 << 31:
        raise ValueError(
            "pack_pattern: Expected weight to hold fewer than 2^31 values, which 32-bit offsets "
            f"reach, got {weight.numel()}"
        )
    if structure not in STRUCTURES:
        raise ValueError(
            f"pack_pattern: Expected structure to be one of {', '.join(STRUCTURES)}, "
            f"got {structure!r}"
        )
    if not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups != 0:
        raise ValueError(
            "pack_pattern: Expected groups to be a positive divisor of the "
            f"{weight.shape[0]} output channels, got {groups!r}"
        )
    if keep is not None and (
        not isinstance(keep, Tensor) or keep.dtype is not torch.bool or keep.shape != weight.shape
    ):
        got = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else repr(keep)
        raise ValueError(
            f"pack_pattern: Expected keep to be a bool tensor of shape {list(weight.shape)}, "
            f"got {got}"
        )


def pack_pattern(
    weight: Tensor,
    *,
    groups: int = 1,
    structure: str = "element",
    keep: Tensor | None = None,
    master: bool = False,
) -> Pattern:
    """Build the pattern of a convolution's weight.

    weight:    [K, C / groups, kh, kw], strided, floating
    groups:    of the convolution
    structure: "element", or "vector(4)", "vector(8)", "vector(16)": that many consecutive output
               channels (of a group) share their live positions; any nonzero keeps its vector
    keep:      bool of the weight's shape, what is alive; default: what is not zero, NaN included
    master:    with `keep`: the weight may have values outside it, which count as zero
    returns:   the pattern, which `sparse_conv2d` takes
    raises:    TypeError, ValueError for other arguments, or for a nonzero outside `keep`
    """
    return Pattern(weight, groups=groups, structure=structure, keep=keep, master=master)
