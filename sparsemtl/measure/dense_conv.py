"""The dense convolutions of torch that sparse ones are compared with: whichever is fastest counts.

nchw           torch on plain tensors
channels_last  torch on tensors with the channels last
mkldnn         oneDNN on its own blocked layout, laid out beforehand; but for a weight in training,
               which is another one each step
compiled       torch.compile with freezing, which lays the weight out once: for inference alone
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from sparsemtl.measure.conv_cases import ConvCase

Call = Callable[[], object]
Convolve = Callable[[Tensor, Tensor], Tensor]


def training_call(convolve: Convolve, x: Tensor, weight: Tensor, grad: Tensor) -> Call:
    """Forward and both gradients, on leaves that share no memory with other candidates."""
    x, weight = (t.clone().requires_grad_() for t in (x, weight))

    def run() -> None:
        torch.autograd.backward(convolve(x, weight), grad)
        x.grad = weight.grad = None

    return run


def dense_calls(
    case: ConvCase, x: Tensor, weight: Tensor, grad: Tensor, training: bool
) -> dict[str, Call]:
    """Name → call of each path that needs no compiler."""
    options: dict[str, Any] = case.options
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, weight, grad)]

    def convolve(a: Tensor, b: Tensor) -> Tensor:
        return conv2d(a, b, **options)

    blocked = torch.backends.mkldnn.is_available()
    if training:
        calls: dict[str, Call] = {
            "nchw": training_call(convolve, x, weight, grad),
            "channels_last": training_call(convolve, *last),
        }
        if blocked:
            calls["mkldnn"] = training_call(convolve, x.to_mkldnn(), weight, grad.to_mkldnn())
        return calls
    calls = {
        "nchw": lambda: convolve(x, weight),
        "channels_last": lambda: convolve(last[0], last[1]),
    }
    if blocked:
        calls["mkldnn"] = _blocked(case, x, weight)
    return calls


def _blocked(case: ConvCase, x: Tensor, weight: Tensor) -> Call:
    g = case.geometry
    padding, stride, dilation = list(g.padding), list(g.stride), list(g.dilation)
    blocked_x = x.to_mkldnn()
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks input_size
    blocked_weight = reorder(weight.to_mkldnn(), padding, stride, dilation, g.groups, list(x.shape))
    return lambda: torch.mkldnn_convolution(
        blocked_x, blocked_weight, None, padding, stride, dilation, g.groups
    )


class Compiler:
    """Compiles convolutions as long as its seconds last; says why it did not.

    skipped: reason → how many times; empty while everything was compiled
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.spent = seconds, 0.0
        self.skipped: dict[str, int] = {}
        self._why_not = None if _has_compiler() else "no C++ compiler was found"

    def call(self, case: ConvCase, x: Tensor, weight: Tensor) -> Call | None:
        """The compiled path, already run once; None where there is none, which is noted."""
        reason = self._why_not
        if reason is None and self.spent >= self.seconds:
            reason = f"the {self.seconds:g} s for compiling were spent"
        if reason is None:
            begin = time.perf_counter()
            try:
                return _frozen(case, x, weight)
            except (RuntimeError, OSError) as error:  # inductor reports a failed compiler so
                reason = self._why_not = f"torch.compile failed: {str(error).splitlines()[0]}"
            finally:
                self.spent += time.perf_counter() - begin
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        return None


def _has_compiler() -> bool:
    from torch._inductor import config

    names = config.cpp.cxx if isinstance(config.cpp.cxx, tuple) else (config.cpp.cxx,)
    return any(name is not None and shutil.which(name) is not None for name in names)


def _frozen(case: ConvCase, x: Tensor, weight: Tensor) -> Call:
    from torch._inductor import config

    torch._dynamo.reset()  # one graph per case: shapes are not to become dynamic
    rows, channels, kh, kw = case.weight
    options: dict[str, Any] = case.options
    layer = nn.Conv2d(channels * case.geometry.groups, rows, (kh, kw), bias=False, **options).eval()
    layer.weight.data.copy_(weight)
    with config.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(layer, dynamic=False)
        compiled(x)
    return lambda: compiled(x)
