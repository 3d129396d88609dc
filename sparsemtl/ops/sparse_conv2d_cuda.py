"""How CUDA C++ computes sparse_conv2d: single live weights, for patterns that are almost all dead.

Lists are made on the device from the pattern's bits (csrc/cuda/pack_pattern.cu). The weight's
gradient is torch's dense one, masked: sampled products of so few weights do not beat it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparsemtl.ops.availability import DTYPES, native_module, why_not_cuda
from sparsemtl.ops.pattern import Pattern
from sparsemtl.ops.sparse_conv2d_backends import ACTIVATIONS, reference_backward
from sparsemtl.ops.sparse_conv2d_plan import Geometry


def why_not_here(x: Tensor | None = None, weight: Tensor | None = None) -> str | None:
    """Why the CUDA C++ kernel cannot run here, or cannot take these tensors; None if it can."""
    reason = why_not_cuda(weight)
    if reason is not None or x is None or weight is None:
        return reason
    if x.dim() == 4 and weight.dim() == 4 and x.shape[1] != weight.shape[1]:
        return "it takes one group of channels"
    if x.dtype not in DTYPES or x.dtype is not weight.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}, it takes one narrow or float32 type"
    if weight.numel() >= 1 << 31:
        return f"the weight has {weight.numel()} values, it counts them in 32 bits"
    return None


@dataclass(frozen=True)
class DeviceLists:
    """What the kernel walks; csrc/cuda/pack_pattern.h says what each array means."""

    starts: Tensor  # [taps · panels · rows + 1] int32
    entries: Tensor  # [capacity, 2] int32: channel within the panel, bits of the float32 value
    sources: Tensor  # [capacity] int32

    @property
    def addresses(self) -> list[int]:
        return [self.starts.data_ptr(), self.entries.data_ptr(), self.sources.data_ptr()]


def pack_lists(weight: Tensor, bits: Tensor, transposed: bool, capacity: int) -> DeviceLists:
    """Lists by output channel, or by input channel; nothing waits for the device.

    weight: [K, C, kh, kw] float32, contiguous, on a CUDA device
    bits:   [⌈P / 8⌉] uint8, one for each weight, lowest first
    """
    outputs, channels = weight.shape[:2]
    taps = weight.shape[2] * weight.shape[3]
    shape = [outputs, channels, taps, channels * taps, taps, 1]
    if transposed:
        shape = [channels, outputs, taps, taps, channels * taps, 1]
    slots = shape[0] * taps * -(-shape[1] // native_module().CUDA_PANEL)

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int32, device=weight.device)

    lists = DeviceLists(empty(slots + 1), empty(max(capacity, 1), 2), empty(max(capacity, 1)))
    with torch.cuda.device(weight.device):
        native_module().pack_pattern_cuda(
            shape, bits.data_ptr(), weight.data_ptr(), lists.addresses, capacity, _stream(weight)
        )
    return lists


def mask_bits(mask: Tensor) -> Tensor:
    """One bit for each element, lowest first.   mask: bool   returns: [⌈P / 8⌉] uint8"""
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).reshape(-1, 8)
    places = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=mask.device)
    return (padded * places).sum(1, dtype=torch.uint8)


def cuda(
    x: Tensor,
    weight: Tensor,
    pattern: Pattern,
    g: Geometry,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    height, width = g.output_size(x.shape[2], x.shape[3])
    y = torch.empty(x.shape[0], weight.shape[0], height, width, dtype=x.dtype, device=x.device)
    after = residual is not None  # then the activation comes last
    _run(x, weight, pattern, g, bias, y, 0 if after else ACTIVATIONS[activation], False)
    if residual is not None:
        y = y + residual
        if activation is not None:
            y = torch.relu(y) if activation == "relu" else torch.nn.functional.relu6(y)
    return y


def cuda_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    pattern: Pattern,
    g: Geometry,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = None
    if needs[0]:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _run(grad, weight, pattern, g, None, grad_x, 0, True)
    dense = reference_backward(grad, x, weight, pattern, g, (False, True)) if needs[1] else None
    return grad_x, None if dense is None else dense[1]


def _run(
    source: Tensor,
    weight: Tensor,
    pattern: Pattern,
    g: Geometry,
    bias: Tensor | None,
    dest: Tensor,
    activation: int,
    transposed: bool,
) -> None:
    if dest.numel() == 0:
        return
    lists = _lists_of(pattern, weight, transposed)
    source = source.detach().contiguous()
    shift = None if bias is None else bias.detach().contiguous()
    shape = [source.shape[0], *source.shape[1:], *dest.shape[1:]]
    shape += [*g.kernel, *g.stride, *g.padding, *g.dilation, int(transposed)]
    with torch.cuda.device(dest.device):
        native_module().sparse_conv2d_cuda(
            DTYPES[dest.dtype],
            shape,
            lists.addresses,
            len(lists.sources),
            source.data_ptr(),
            0 if shift is None else shift.data_ptr(),
            dest.data_ptr(),
            activation,
            _stream(dest),
        )


# Of each pattern: its bits when they were packed, and lists by (transposed).
_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _lists_of(pattern: Pattern, weight: Tensor, transposed: bool) -> DeviceLists:
    """The pattern's lists with the present values; packed anew when its bits have changed."""
    bits, made = _packed.get(pattern, (None, {}))
    if bits is not pattern._bits:
        made = {}
        _packed[pattern] = (pattern._bits, made)
    values = weight.detach().float().contiguous()
    if transposed in made:
        lists: DeviceLists = made[transposed]
        slots = len(lists.starts) - 1
        with torch.cuda.device(weight.device):
            native_module().refresh_values_cuda(
                lists.addresses, len(lists.sources), slots, values.data_ptr(), _stream(weight)
            )
        return lists
    made[transposed] = pack_lists(
        values, mask_bits(pattern.mask()), transposed, max(pattern.nonzeros, 1)
    )
    return made[transposed]


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream
