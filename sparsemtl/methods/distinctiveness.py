"""Distinctiveness pruning: hidden units whose patterns are alike or opposed become one.

Source: Singh, "Analysing Efficiency of Deep Multi-Task Networks Using Distinctiveness Pruning". At
each epoch's end the units that are not distinct are merged (`unit_merging.py`); the layer really
shrinks, and the optimizer and batch norm with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsemtl.errors import unknown_choice
from sparsemtl.methods.base import Method, StepState
from sparsemtl.methods.unit_merging import (
    DistinctivenessConfig,
    Patterns,
    merge_units,
    smallest_angle,
)
from sparsemtl.models.joint import HiddenLayer, Shrunk, keep_units


class Distinctiveness(Method):
    """Progressive: an epoch of training, then every pair that is not distinct is merged."""

    name = "distinctiveness"

    def __init__(
        self, config: DistinctivenessConfig, components: Mapping[str, Any] | None = None
    ) -> None:
        self.config = config
        self.sizes: list[int] = []  # units at the start, and after each epoch
        self.angles: list[float] = []  # smallest angle between two units, before each merging
        self.patterns: Patterns | None = None  # of the epoch so far, equal in all processes
        self._recorded: Patterns | None = None  # where a forward pass adds to, if anywhere

    def prepare(self, model: nn.Module, steps: int, batches: Iterable[Any] = ()) -> None:
        self.layer = find_hidden_layer(model, self.config)
        self.sizes = [self.layer.size]
        self.patterns = Patterns.empty(self.layer.size)
        self._hook = self.layer.readers[0].register_forward_pre_hook(self._record)

    def on_forward(self, state: StepState) -> None:
        if self.config.patterns != "pass":
            self._recorded = Patterns.empty(self.layer.size)

    def on_step(self, state: StepState) -> None:
        batch, self._recorded = self._recorded, None
        if batch is not None:
            # At once, and not at the epoch's end: one checkpoint serves all processes.
            state.average(batch.tensors())
            assert self.patterns is not None
            self.patterns = batch if self.config.patterns == "batch" else self.patterns + batch
        if state.step % state.steps_per_epoch:
            return
        patterns = self._pass(state) if self.config.patterns == "pass" else self.patterns
        assert patterns is not None
        self.angles.append(smallest_angle(patterns, self.config))
        if state.step > self.config.warmup * state.steps_per_epoch:
            shrunk, kept = merge_units(self.layer, patterns, self.config)
            shrink_optimizer(state.optimizer, shrunk, kept)
        self.sizes.append(self.layer.size)
        self.patterns = Patterns.empty(self.layer.size)

    def finalize(self, model: nn.Module) -> nn.Module:
        self._hook.remove()
        return model

    def describe(self, model: nn.Module) -> dict[str, Any]:
        return {
            "hidden": self.layer.size,
            "smallest_angle": self.angles[-1] if self.angles else None,
        }

    def before_load(self, model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        size = state["sizes"][-1]
        if not 1 <= size <= self.layer.size:
            raise ValueError(f"{self.name}: Expected 1..{self.layer.size} units, got {size}")
        kept = torch.arange(size)
        shrink_optimizer(optimizer, keep_units(self.layer, kept), kept)

    def state_dict(self) -> dict[str, Any]:
        assert self.patterns is not None
        return {
            "sizes": list(self.sizes),
            "angles": list(self.angles),
            "patterns": self.patterns.tensors(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sizes, self.angles = list(state["sizes"]), list(state["angles"])
        self.patterns = Patterns(*(tensor.clone() for tensor in state["patterns"]))

    def _record(self, reader: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._recorded is not None:
            self._recorded.add(inputs[0])

    def _pass(self, state: StepState) -> Patterns:
        """Patterns of the present weights over the training samples, as training sees them."""
        self._recorded = found = Patterns.empty(self.layer.size)
        count = self.config.pattern_batches or state.steps_per_epoch
        with torch.no_grad(), as_in_training(state.model):
            for batch in state.scoring_batches(count):
                state.forward(batch)
        self._recorded = None
        state.average(found.tensors())
        return found


@contextlib.contextmanager
def as_in_training(model: nn.Module) -> Iterator[None]:
    """Batch statistics, but no dropout, and nothing that the passes leave behind.

    Running statistics lag behind the weights. Early in training they would give every unit the
    same large offset, and all angles would be near 0.
    """
    modes = {module: module.training for module in model.modules()}
    norms = [m for m in modes if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    buffers = {b: b.clone() for norm in norms for b in norm.buffers()}
    model.eval()
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for buffer, before in buffers.items():
            buffer.copy_(before)
        for module, mode in modes.items():
            module.training = mode


def shrink_optimizer(optimizer: Optimizer, shrunk: Sequence[Shrunk], kept: Tensor) -> None:
    """Give the optimizer the shrunken parameters, with their moments cut likewise.

    raises: ValueError if the optimizer does not hold one of them
    """
    for change in shrunk:
        groups = [g for g in optimizer.param_groups if any(p is change.old for p in g["params"])]
        if not groups:
            raise ValueError(
                "distinctiveness: Expected the optimizer to hold every parameter of the hidden "
                f"layer, got none of shape {list(change.old.shape)}"
            )
        parameters = groups[0]["params"]
        groups[0]["params"] = [change.new if p is change.old else p for p in parameters]
        if change.old in optimizer.state:
            moments = optimizer.state.pop(change.old)
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == change.old.shape:
                    moments[name] = value.index_select(change.dim, kept.to(value.device))
            optimizer.state[change.new] = moments


def find_hidden_layer(model: nn.Module, config: DistinctivenessConfig) -> HiddenLayer:
    """The layer that is pruned: by the config's names, or what the model says of itself.

    raises: ValueError or TypeError saying what is missing
    """
    if not config.hidden:
        own = getattr(model, "hidden_layer", None)
        layer = own() if callable(own) else None
        if not isinstance(layer, HiddenLayer):
            raise ValueError(
                "distinctiveness: Expected a network with a joint hidden layer (model.head=joint, "
                f"or the names hidden and readers of the method), got {type(model).__name__}"
            )
    else:
        layer = HiddenLayer(
            _named(model, "hidden", config.hidden, nn.Linear),
            _named(model, "norm", config.norm, nn.BatchNorm1d) if config.norm else None,
            tuple(_named(model, "readers", name, nn.Linear) for name in config.readers),
        )
    wrong = [r for r in layer.readers if r.in_features != layer.size]
    if not layer.readers or wrong:
        found = [r.in_features for r in layer.readers] or "none"
        raise ValueError(f"distinctiveness: Expected readers of {layer.size} units, got {found}")
    return layer


def _named(model: nn.Module, what: str, name: str, kind: type[Any]) -> Any:
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"distinctiveness: {unknown_choice(what, name, modules)}")
    if not isinstance(modules[name], kind):
        raise TypeError(
            f"distinctiveness: Expected {what} {name!r} to be a {kind.__name__}, "
            f"got {type(modules[name]).__name__}"
        )
    return modules[name]
