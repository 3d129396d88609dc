"""Multiply-accumulates of a network: dense, in bounds and sparse, per layer and component.

Counted are the products inside Conv2d and Linear modules; biases, batch norm, activations,
pooling and matrix products outside such modules are not. 1 MAC = 2 FLOP.

- nominal: every tap of every output pixel, padding included: what dense kernels execute;
- in-bounds: without the taps that read zero padding, which no result depends on;
- sparse: only nonzero weights, again nominal and in-bounds. This is work a kernel could skip
  (theoretical); what a run really skips is measured in time, never here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsemtl.models import Component, find_components
from sparsemtl.models.component import layers_of

CONVENTION = (
    "MAC of Conv2d and Linear only; 1 MAC = 2 FLOP; nominal counts padding taps, in-bounds does "
    "not; sparse counts nonzero weights"
)
NO_COMPONENT = "(no component)"


@dataclass(frozen=True)
class Work:
    """Counts that add up: multiply-accumulates, weights and nonzero weights.

    A weight that several layers share counts in each of them, as its products do.
    """

    dense_mac: int = 0
    in_bounds_mac: int = 0
    sparse_mac: int = 0
    sparse_in_bounds_mac: int = 0
    weights: int = 0
    nonzeros: int = 0

    @property
    def sparsity(self) -> float:
        """Fraction of zero weights, 0 without weights."""
        return 1.0 - self.nonzeros / self.weights if self.weights else 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))


@dataclass(frozen=True)
class LayerFlops:
    """One layer: where it is, what it reads and writes, and its work.

    calls: how often one forward pass runs it; 0 for a layer that the pass never reaches
    output: shape of its last output, () if never reached
    """

    name: str
    component: str
    weight: tuple[int, ...]
    output: tuple[int, ...]
    calls: int
    work: Work


@dataclass(frozen=True)
class FlopReport:
    """Work of one forward pass on an input of shape `input`, in module order."""

    input: tuple[int, ...]
    layers: tuple[LayerFlops, ...]
    convention: str = CONVENTION

    @property
    def total(self) -> Work:
        return sum((layer.work for layer in self.layers), Work())

    @property
    def components(self) -> dict[str, Work]:
        """Component → its work, in order of first appearance."""
        sums: dict[str, Work] = {}
        for layer in self.layers:
            sums[layer.component] = sums.get(layer.component, Work()) + layer.work
        return sums

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers and strings, ready for JSON."""
        return {
            "input": list(self.input),
            "convention": self.convention,
            "total": asdict(self.total),
            "components": {name: asdict(work) for name, work in self.components.items()},
            "layers": [asdict(layer) for layer in self.layers],
        }


def count_flops(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    weights: Mapping[str, Tensor] | None = None,
    components: Mapping[str, Component] | None = None,
    example: Tensor | None = None,
) -> FlopReport:
    """Count the work of one forward pass.

    Nothing is computed: shapes are propagated, so that any size and any model is instant. The
    model is left as it was, on whatever device it is.

    input_size: (H, W) for one RGB image, or the whole shape, such as (B, 3, H, W)
    weights:    qualified layer name → weight that the layer really uses (after thresholding or
                masking); by default the layer's own `weight`. A weight on the meta device has
                no values and counts as dense.
    components: default `find_components(model)` where the model has `components()`, else none
    example:    run the model on this input for real instead, for a network whose control flow
                depends on values; input_size is then ignored
    raises:     ValueError for a bad size, an unknown layer in weights or a weight of another shape
    """
    layers = dict(layers_of(model))
    weights = dict(weights or {})
    _check_weights(layers, weights)
    if components is None:
        components = find_components(model) if hasattr(model, "components") else {}
    owners = {id(m): c.name for c in components.values() for _, m in c.layers}
    shape = _input_shape(input_size) if example is None else tuple(example.shape)
    calls = _record_calls(model, layers, shape, example)
    rows = []
    for name, layer in layers.items():
        owner = owners.get(id(layer), NO_COMPONENT)
        weight = weights.get(name, cast(Tensor, layer.weight))
        rows.append(_layer_flops(name, owner, layer, weight, calls[name]))
    return FlopReport(shape, tuple(rows))


_Call = tuple[tuple[int, ...], tuple[int, ...]]  # shapes of one input and its output


def _input_shape(input_size: Sequence[int]) -> tuple[int, ...]:
    size = tuple(input_size)
    if len(size) < 2 or any(not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(
            f"count_flops: Expected input_size to be (H, W) or a whole shape of positive "
            f"integers, got {size}"
        )
    return (1, 3, *size) if len(size) == 2 else size


def _check_weights(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if name not in layers:
            raise ValueError(
                f"count_flops: Expected weights to name Conv2d or Linear layers, got {name!r}; "
                f"the layers are {list(layers)[:5]}... ({len(layers)} in all)"
            )
        expected = list(cast(Tensor, layers[name].weight).shape)
        if list(weight.shape) != expected:
            raise ValueError(
                f"count_flops: Expected weight of {name!r} to have shape {expected}, got "
                f"{list(weight.shape)}"
            )


def _record_calls(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    example: Tensor | None,
) -> dict[str, list[_Call]]:
    calls: dict[str, list[_Call]] = {name: [] for name in layers}
    with torch.no_grad(), _evaluating(model):
        if example is not None:
            with _hooked(layers, calls):
                model(example)
            return calls
        first = next(model.parameters(), None)
        with FakeTensorMode(allow_non_fake_inputs=True), _dense_forwards(layers, calls):
            model(
                torch.empty(
                    shape,
                    device=None if first is None else first.device,
                    dtype=None if first is None else first.dtype,
                )
            )
    return calls


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], calls: dict[str, list[_Call]]) -> Iterator[None]:
    def record(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[name].append((tuple(inputs[0].shape), tuple(output.shape)))

    handles = [m.register_forward_hook(partial(record, name)) for name, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _dense_forwards(
    layers: Mapping[str, nn.Module], calls: dict[str, list[_Call]]
) -> Iterator[None]:
    """Let each layer do torch's own dense product, whose shapes can be propagated.

    Subclasses may call kernels that need real memory; their output has the same shape.
    """

    def forward(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Conv2d):
            output = nn.Conv2d._conv_forward(layer, x, layer.weight, layer.bias)
        else:
            output = nn.functional.linear(x, layer.weight, layer.bias)  # type: ignore[arg-type]
        calls[name].append((tuple(x.shape), tuple(output.shape)))
        return output

    saved = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.forward = partial(forward, name, layer)
        yield
    finally:
        for name, layer in layers.items():
            if saved[name] is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = saved[name]  # type: ignore[assignment]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode again after."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _layer_flops(
    name: str, component: str, layer: nn.Module, weight: Tensor, calls: Sequence[_Call]
) -> LayerFlops:
    taps = _nonzeros_per_tap(layer, weight)
    total = Work(weights=weight.numel(), nonzeros=int(taps.sum()))
    for read, written in calls:
        if isinstance(layer, nn.Conv2d):
            total = total + _conv_work(layer, taps, read, written)
        else:
            pixels = prod(written[:-1])
            dense, sparse = pixels * weight.numel(), pixels * int(taps.sum())
            total = total + Work(dense, dense, sparse, sparse)
    output = calls[-1][1] if calls else ()
    return LayerFlops(name, component, tuple(weight.shape), output, len(calls), total)


def _nonzeros_per_tap(layer: nn.Module, weight: Tensor) -> Tensor:
    """Nonzero weights of each kernel position: int64 [kh, kw], [1] for a linear layer."""
    conv = isinstance(layer, nn.Conv2d)
    if weight.is_meta:
        kernel = tuple(weight.shape[2:]) if conv else (1,)
        return torch.full(kernel, weight.numel() // max(prod(kernel), 1), dtype=torch.int64)
    alive = weight.detach() != 0
    return (alive.sum((0, 1)) if conv else alive.sum().reshape(1)).cpu()


def _conv_work(
    layer: nn.Conv2d, taps: Tensor, read: tuple[int, ...], written: tuple[int, ...]
) -> Work:
    batch = read[0] if len(read) == 4 else 1  # Conv2d also takes one image without a batch
    pixels = batch * written[-2] * written[-1]
    per_tap = layer.weight.shape[0] * layer.weight.shape[1]
    rows, columns = (_positions_in_bounds(layer, d, read[d - 2], written[d - 2]) for d in (0, 1))
    in_bounds = batch * rows[:, None] * columns[None, :]  # [kh, kw]
    return Work(
        dense_mac=pixels * layer.weight.numel(),
        in_bounds_mac=per_tap * int(in_bounds.sum()),
        sparse_mac=pixels * int(taps.sum()),
        sparse_in_bounds_mac=int((taps * in_bounds).sum()),
    )


def _positions_in_bounds(layer: nn.Conv2d, dim: int, size: int, out: int) -> Tensor:
    """For each tap of one dimension, how many output positions read inside the map: [k]."""
    kernel, dilation = layer.kernel_size[dim], layer.dilation[dim]
    if layer.padding_mode != "zeros":  # reflected or wrapped padding is data
        return torch.full((kernel,), out, dtype=torch.int64)
    if layer.padding == "valid":
        before = 0
    elif layer.padding == "same":
        before = dilation * (kernel - 1) // 2  # torch puts the odd one behind
    else:
        before = int(layer.padding[dim])
    first = torch.arange(out) * layer.stride[dim] - before  # [out]
    at = first + dilation * torch.arange(kernel)[:, None]  # [k, out]
    return ((at >= 0) & (at < size)).sum(1)
