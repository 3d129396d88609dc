"""The forward pass of a training step, compiled or as a CUDA graph, where that is asked for.

Compiled: `torch.compile` takes the dense parts, and leaves each layer that may run on a sparse
kernel to that kernel. As a CUDA graph: once the masks are fixed, nothing of the forward and
backward pass depends on Python any more; both are captured and replayed, which saves the launches.
Losses, weighting and optimizer run as always. Where either cannot be had, the log says why, and the
model is simply called.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsemtl.sparsity.layers import SparseLayer
from sparsemtl.sparsity.sparsify import Sparsity
from sparsemtl.training.runtime import RuntimeConfig

log = logging.getLogger(__name__)
WARM_UP = 3  # plain calls before a capture: layers choose their kernels, caches are filled
Call = Callable[[Tensor], Any]
Capture = Callable[[nn.Module, tuple[Tensor, ...]], Call]


def fast_forward(model: nn.Module, config: RuntimeConfig, several_gradients: bool = False) -> Call:
    """What a training step calls in place of the model.

    several_gradients: whether more than one is taken of a forward pass, which a graph cannot give
    """
    call: Call = CompiledCall(model) if config.compile else model
    if not config.cuda_graph:
        return call
    if several_gradients:
        log.warning("without a CUDA graph: the balance takes several gradients of a forward pass")
        return call
    return GraphedCall(model, call)


class CompiledCall:
    """Calls a model whose forward is compiled; hooks run as always.

    Layers that may use sparse kernels are called outside of the compiled code, whose graph breaks
    there. The model itself stays as it is: what is compiled is put in place for the call alone.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        self._model = model
        self._forwards: dict[nn.Module, Any] = {}
        sparsity = getattr(model, "sparsity", None)
        if isinstance(sparsity, Sparsity) and sparsity.sparse_kernels:
            for module in model.modules():
                if isinstance(module, SparseLayer):
                    self._forwards[module] = torch.compiler.disable(module.forward)
        self._forwards[model] = torch.compile(model.forward, backend=backend)

    def __call__(self, x: Tensor) -> Any:
        with _in_place(self._forwards), warnings.catch_warnings():
            # Where a graph breaks, the compiler looks at what only a leaf has.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            return self._model(x)


@contextmanager
def _in_place(forwards: dict[nn.Module, Any]) -> Iterator[None]:
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


class GraphedCall:
    """Calls a model in training, as CUDA graphs of its forward and backward pass where it can.

    model:   what is trained
    call:    how it is called otherwise
    capture: makes the graphs of a module and its sample inputs; torch's own by default
    kind:    of device on which graphs are captured

    A graph reads memory that was there when it was captured, so it is dropped when a parameter
    moves, another mask is fixed, or the batch has another shape, and made anew after WARM_UP calls.
    """

    def __init__(
        self, model: nn.Module, call: Call, capture: Capture | None = None, kind: str = "cuda"
    ) -> None:
        self._model, self._call, self._kind = model, call, kind
        self._capture = capture or _capture
        self._key: object = None
        self._calls = 0
        self._graph: Call | None = None
        self._said: str | None = None
        self.failed: str | None = None  # why a capture did not work; it is not tried again

    def __call__(self, x: Tensor) -> Any:
        reason = self.why_not(x)
        if reason is not None:
            self._say(reason)
            self._key, self._graph = None, None
            return self._call(x)
        key = self._what_is_read(x)
        if key != self._key:
            self._key, self._calls, self._graph = key, 0, None
        if self._graph is None:
            self._calls += 1
            if self._calls <= WARM_UP:
                return self._call(x)
            self._graph = self._captured(x)
        return self._call(x) if self._graph is None else self._graph(x)

    def why_not(self, x: Tensor) -> str | None:
        """Why this call cannot be a graph; None if it can."""
        if self.failed is not None:
            return self.failed
        if x.device.type != self._kind:
            return f"the batch is on {x.device}, a CUDA graph needs {self._kind}"
        if not torch.is_grad_enabled() or not self._model.training:
            return "the model is not being trained"
        sparsity = getattr(self._model, "sparsity", None)
        if isinstance(sparsity, Sparsity) and (sparsity.open or not sparsity.frozen):
            return "the masks still move, and with them the kernels that are fastest"
        return None

    def _what_is_read(self, x: Tensor) -> object:
        sparsity = getattr(self._model, "sparsity", None)
        masks = sparsity.masks if isinstance(sparsity, Sparsity) else None
        kernels = isinstance(sparsity, Sparsity) and sparsity.sparse_kernels
        places = tuple((p.data_ptr(), p.requires_grad) for p in self._model.parameters())
        narrow = torch.is_autocast_enabled(x.device.type)
        return (tuple(x.shape), x.dtype, x.device, id(masks), kernels, narrow, places)

    def _captured(self, x: Tensor) -> Call | None:
        """The graphs; running statistics and random numbers are as if nothing had been run."""
        kept = [(buffer, buffer.clone()) for buffer in self._model.buffers()]
        random = torch.cuda.get_rng_state(x.device) if x.is_cuda else None
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a narrow copy would be read when it is gone
        try:
            return self._capture(_Plain(self._model, self._call), (x.detach().clone(),))
        except RuntimeError as error:
            self.failed = f"capturing failed: {error}"
            self._say(self.failed)
            return None
        finally:
            torch.set_autocast_cache_enabled(cached)
            with torch.no_grad():
                for buffer, value in kept:
                    buffer.copy_(value)
            if random is not None:
                torch.cuda.set_rng_state(random, x.device)

    def _say(self, reason: str) -> None:
        if reason != self._said:
            self._said = reason
            log.warning("without a CUDA graph: %s", reason)


class _Plain(nn.Module):
    """A model without its hooks, which torch's capture refuses: calling it calls them all the same.

    It holds the model's parameters, which are what the captured backward pass has gradients of.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(x)


def _capture(module: nn.Module, sample: tuple[Tensor, ...]) -> Call:
    found: Call = torch.cuda.make_graphed_callables(module, sample, allow_unused_input=True)
    return found
