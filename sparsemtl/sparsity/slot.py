"""A sparse layer's place in its model's `Sparsity`, and what it keeps there between two steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemtl.ops.masking import mask_into, masked
from sparsemtl.ops.pattern import Pattern, pack_pattern
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.sparsity import choice_gpu
from sparsemtl.sparsity.candidates_gpu import GpuLayer, make_layer
from sparsemtl.sparsity.choice import choose
from sparsemtl.sparsity.passes import ChosenConv2d, dense_forward
from sparsemtl.sparsity.ready import Stamp

if TYPE_CHECKING:
    from sparsemtl.sparsity.sparsify import Sparsity

IDLE_THETA = -14.0  # α = 8e-7: below it next to nothing is dead, and nobody needs to count


@dataclass
class Slot:
    """A layer's place in its model's `Sparsity`: group `group`, place `place` within the group."""

    sparsity: Sparsity
    group: int
    place: int
    pattern: Pattern | None = field(default=None, compare=False)  # of the last effective weight
    packed: tuple[Tensor, int] | None = field(default=None, compare=False)  # its mask, and version
    gpu: GpuLayer | None = field(default=None, compare=False)
    kept: Tensor | None = field(default=None, compare=False)  # the mask that `gpu` was made for
    dense: MaskedCopy | None = field(default=None, compare=False)  # for passes that run dense

    def effective_weight(self, weight: Tensor) -> Tensor:
        return self.sparsity.effective_weight(self.group, self.place, weight)

    @property
    def sparse_kernels(self) -> bool:
        """Whether this layer may run sparse now: asked for, and some weight may be dead."""
        return (self.sparsity.sparse_kernels and not self.sparsity.open) and (
            self.sparsity.frozen or self.sparsity.theta.detach()[self.group].item() > IDLE_THETA
        )

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        """The convolution with what is alive of a master weight, each pass as measured faster."""
        masks = self.sparsity.masks
        keep = None if masks is None else masks[self.group][self.place]
        if keep is None:
            weight = self.effective_weight(weight)
        pattern = self._pattern(weight, g, keep)
        picked = choose(x, weight, bias, g, pattern, keep)
        if not picked.any and (keep is None or pattern.nonzeros == weight.numel()):
            return dense_forward(x, weight, bias, g)
        if picked.any:
            pattern.update(weight)
        dense = None
        if keep is not None and picked.reads_dense(x.requires_grad and torch.is_grad_enabled()):
            self.dense = self.dense or MaskedCopy()
            dense = self.dense.of(weight, keep)
        y: Tensor = ChosenConv2d.apply(x, weight, bias, g, pattern, picked, keep, dense)
        return y

    def _pattern(self, weight: Tensor, g: Geometry, keep: Tensor | None) -> Pattern:
        """What is alive now. A fixed mask is packed once; its values follow when they are used."""
        pattern, packed = self.pattern, self.packed
        if keep is None:
            same = packed is None
        else:
            same = packed is not None and packed[0] is keep and packed[1] == keep._version
        if pattern is None or pattern.groups != g.groups or not same:
            pattern = self.pattern = pack_pattern(
                weight, groups=g.groups, keep=keep, master=keep is not None
            )
            self.packed = None if keep is None else (keep, keep._version)
        elif keep is None:
            pattern.update(weight)
        return pattern

    def convolve_on_gpu(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, master: Tensor
    ) -> Tensor | None:
        """The same by the GPU's kernels; None where they cannot run or were not asked for.

        weight: the effective one   master: what it was made of
        """
        if not self.sparsity.sparse_kernels or self.sparsity.open:
            return None
        shrunk, kind = weight, x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if choice_gpu.why_not_on_gpu(x, weight, g) is not None:
            return None
        masks = self.sparsity.masks
        keep = None if masks is None else masks[self.group][self.place]
        if self.gpu is None or self.kept is not keep or self.gpu.whole.device != x.device:
            self.gpu = make_layer(shrunk, g.groups, self.sparsity.structure, keep)
            self.kept = keep
        through = None
        if keep is None and master.dtype is torch.float32:
            through = (master, self.sparsity.group_alpha(self.group))
        stamp = None
        if not master.is_inference():
            stamp = (master._version, master.data_ptr(), self.sparsity.theta._version, weight.dtype)
        return choice_gpu.convolve(self.gpu, x, weight, bias, g, through, stamp)

    def __getstate__(self) -> dict[str, Any]:
        # Packed anew from the weight.
        fresh = ("pattern", "packed", "gpu", "kept", "dense")
        return {**self.__dict__, **dict.fromkeys(fresh)}


class MaskedCopy:
    """where(keep, weight, 0) of a master weight, in memory that serves step after step.

    A fresh copy in each step would touch fresh pages, which costs several times the masking.
    """

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._stamps: tuple[Stamp, Stamp] | None = None

    def of(self, weight: Tensor, keep: Tensor) -> Tensor:
        """The masked weight as it is now; what was returned before follows.

        Written each time, so that no change goes unseen. Where torch has counted a change, it
        counts this one too: a backward pass that still needs the old values is refused, as it is
        for the weight itself.
        """
        values, stamps = self._values, self._stamps
        if values is None or stamps is None or not _alike(values, weight):
            values = self._values = masked(weight, keep)
        else:
            mask_into(weight, keep, values)
            if not (stamps[0].fits(weight) and stamps[1].fits(keep)):
                torch.autograd.graph.increment_version(values)
        self._stamps = Stamp.of(weight), Stamp.of(keep)
        return values


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
