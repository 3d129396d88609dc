"""Dense or sparse, layer by layer and pass by pass: whichever was measured faster on this machine.

A convolution has three passes: forward, input gradient, weight gradient. For each layer shape and
density bucket all three are timed once, dense against sparse, on the tensors at hand, with what
each needs beside it: a mask that still moves is packed anew each step, the values of a fixed one
are gathered, and a dense pass masks the weight and its gradient. Choices are kept in a file of this
machine (`SPARSEMTL_CACHE`, by default ~/.cache/sparsemtl) and in a run's checkpoints: the same seed
must give the same bits again, and dense and sparse kernels differ in the last ones. Where the file
cannot be written, layers stay dense.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from sparsemtl.ops.masking import mask_, masked
from sparsemtl.ops.pattern import Pattern, pack_pattern
from sparsemtl.ops.sparse_conv2d import sparse_conv2d_grads, sparse_conv2d_values
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.timing import interleave

log = logging.getLogger(__name__)

# Upper ends of density buckets; a layer decides anew when it enters another. Denser stays dense.
BUCKETS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
MARGIN = 0.95  # sparse must be this much faster: noise is no reason to switch
ROUNDS, BUDGET = 5, 2.0  # timed rounds, and seconds after which no further round begins


@dataclass(frozen=True)
class PassChoice:
    """Which passes of a convolution run sparse; on a GPU, by which candidate of choice_gpu.py."""

    forward: bool | str = False
    input_grad: bool | str = False
    weight_grad: bool | str = False

    @property
    def any(self) -> bool:
        return bool(self.forward or self.input_grad or self.weight_grad)


DENSE = PassChoice()


def density_bucket(density: float) -> int | None:
    """Index into BUCKETS, None above the last: not worth a measurement."""
    place = bisect.bisect_left(BUCKETS, density)
    return place if place < len(BUCKETS) else None


class Choices:
    """What was measured on this machine; one instance, `CHOICES`, serves all models."""

    def __init__(self) -> None:
        self._known: dict[str, PassChoice] = {}
        self._pinned: dict[str, PassChoice] = {}
        self._warned = False

    def find(self, key: str) -> PassChoice | None:
        """A known choice: of the resumed run, of this process, or of the machine's file."""
        if key in self._pinned:
            return self._pinned[key]
        if key not in self._known:
            self._known |= _read(cache_file()).get(machine_key(), {})
        return self._known.get(key)

    def keep(self, key: str, measured: PassChoice) -> PassChoice:
        """Enter a measurement; whoever measured first decides. Unwritable: stay dense."""
        try:
            self._known |= _merge(cache_file(), machine_key(), key, measured)
        except OSError as error:
            if not self._warned:
                self._warned = True
                log.warning("layers stay dense: cannot write %s: %s", cache_file(), error)
            self._known[key] = DENSE
        return self._known[key]

    def forget(self) -> None:
        """Know nothing but what the machine's file says."""
        self._known.clear()
        self._pinned.clear()

    def state_dict(self) -> dict[str, Any]:
        """All choices that this process knows of, for a checkpoint."""
        return {k: list(astuple(v)) for k, v in {**self._known, **self._pinned}.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Decide as the run did that wrote `state`, whatever the machine's file says now."""
        self._pinned = {k: PassChoice(*v) for k, v in state.items()}


CHOICES = Choices()


def cache_file() -> Path:
    """Where this machine's choices are kept."""
    root = os.environ.get("SPARSEMTL_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "sparsemtl") / "choices.json"


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    return f"{model or platform.processor()} x{os.cpu_count()}"


def machine_key() -> str:
    """What a measurement depends on besides the layer."""
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def layer_key(x: Tensor, weight: Tensor, g: Geometry, bucket: int, fixed: bool) -> str:
    """Everything about one use of a layer that its speed depends on."""
    layout = "nhwc" if x.is_contiguous(memory_format=torch.channels_last) else "nchw"
    sizes = f"{list(x.shape)} {list(weight.shape)}"
    shape = f"{sizes} s{g.stride} p{g.padding} d{g.dilation} g{g.groups}"
    needs = f"{int(x.requires_grad)}{int(torch.is_grad_enabled())}"
    return f"{shape} {layout} {needs} density<={BUCKETS[bucket]} {'fixed' if fixed else 'open'}"


def choose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Geometry,
    pattern: Pattern,
    keep: Tensor | None = None,
) -> PassChoice:
    """The choice for these tensors, measured now if it is not known.

    keep: the fixed mask of a master weight; None where the weight's own zeros are what is dead
    """
    bucket = density_bucket(pattern.nonzeros / max(1, weight.numel()))
    if bucket is None or x.numel() == 0 or weight.numel() == 0:
        return DENSE
    key = layer_key(x, weight, g, bucket, keep is not None)
    known = CHOICES.find(key)
    return known if known is not None else CHOICES.keep(key, measure(x, weight, bias, g, keep))


def measure(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, keep: Tensor | None = None
) -> PassChoice:
    """Time the passes that will run, dense against sparse, on these very tensors."""
    training = torch.is_grad_enabled()
    x_needs_grad, x = x.requires_grad, x.detach()
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    begin = time.perf_counter()
    pack = partial(pack_pattern, weight, groups=g.groups, keep=keep, master=keep is not None)
    pattern = pack()
    with torch.no_grad():
        y = sparse_conv2d_values(x, weight, bias, g, pattern)
        grad = torch.ones_like(y, memory_format=torch.preserve_format)
        wanted: dict[str, tuple[bool, bool] | None] = {"forward": None}
        if training:
            wanted |= {"input_grad": (True, False)} if x_needs_grad else {}
            wanted |= {"weight_grad": (False, True)}
        calls: dict[str, Callable[[], object]] = {}
        for name, needs in wanted.items():
            if needs is None:
                calls[f"dense {name}"] = partial(_dense_forward, x, weight, bias, g, keep)
            else:
                calls[f"dense {name}"] = partial(_dense_grads, grad, x, weight, g, needs, keep)
            calls[f"sparse {name}"] = partial(
                _sparse_pass, grad, x, weight, bias, g, pattern, needs
            )
        seconds = {name: t.best for name, t in interleave(calls, ROUNDS, 1, budget=BUDGET).items()}
        # Beside the passes: packing a mask that moves, gathering the values of a fixed one.
        whole = float("inf")
        for _ in range(2):
            start = time.perf_counter()
            if keep is None:
                pattern = pack()
            else:
                pattern.update(weight.clone())  # another tensor, so its values are read again
            for needs in wanted.values():
                _sparse_pass(grad, x, weight, bias, g, pattern, needs)
            whole = min(whole, time.perf_counter() - start)
    following = max(0.0, whole - sum(seconds[f"sparse {p}"] for p in wanted))
    gains = {p: MARGIN * seconds[f"dense {p}"] - seconds[f"sparse {p}"] for p in wanted}
    won = {p for p, gain in gains.items() if gain > 0.0}
    pays = sum(gains[p] for p in won) > following
    log.info("measured %s in %.2f s: %s", list(weight.shape), time.perf_counter() - begin, seconds)
    return PassChoice(**dict.fromkeys(won, True)) if pays else DENSE


def _sparse_pass(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Geometry,
    pattern: Pattern,
    needs: tuple[bool, bool] | None,
) -> object:
    """The forward pass without `needs`, else those gradients."""
    if needs is None:
        return sparse_conv2d_values(x, weight, bias, g, pattern)
    return sparse_conv2d_grads(grad, x, weight, g, pattern, needs)


def dense_forward(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """torch's own convolution."""
    return conv2d(x, weight, bias, g.stride, g.padding, g.dilation, g.groups)


def dense_grads(
    grad: Tensor, x: Tensor, weight: Tensor, g: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """torch's own gradients of x and weight, each only if needed."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, g.stride, g.padding, g.dilation, False, (0, 0), g.groups,
        (*needs, False),
    )  # fmt: skip
    return grad_x, grad_weight


def _dense_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, keep: Tensor | None
) -> Tensor:
    return dense_forward(x, weight if keep is None else masked(weight, keep), bias, g)


def _dense_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    g: Geometry,
    needs: tuple[bool, bool],
    keep: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """As `dense_grads`, the weight's gradient zero outside the mask."""
    grad_x, grad_weight = dense_grads(grad, x, weight, g, needs)
    if keep is not None and grad_weight is not None:
        mask_(grad_weight, keep)
    return grad_x, grad_weight


class ChosenConv2d(torch.autograd.Function):
    """A convolution whose passes each run dense or sparse.

    keep: None: the weight's gradient is that of the dense convolution on live weights; on dead ones
          it may be 0 already, which the soft threshold's own backward makes of it anyway.
          A mask: the weight is a master weight that counts inside the mask alone, and so is its
          gradient; sparse passes read it in place, for dense ones it is masked.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        g: Geometry,
        pattern: Pattern,
        choice: PassChoice,
        keep: Tensor | None = None,
    ) -> Tensor:
        x_needed = ctx.needs_input_grad[0]
        dense = weight
        if keep is not None and not (choice.forward and (choice.input_grad or not x_needed)):
            dense = masked(weight, keep)
        # A dense pass that nothing will run needs no copy of the weight to live on.
        later = dense if x_needed and not choice.input_grad else weight
        ctx.save_for_backward(x, weight, None if later is weight else later)
        ctx.g, ctx.pattern, ctx.choice, ctx.keep = g, pattern, choice, keep
        if choice.forward:
            return sparse_conv2d_values(x, weight, bias, g, pattern)
        return dense_forward(x, dense, bias, g)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, dense = ctx.saved_tensors
        dense = weight if dense is None else dense
        needed = ctx.needs_input_grad
        sparse = (ctx.choice.input_grad, ctx.choice.weight_grad)
        grads: list[Tensor | None] = [None, None]
        for kind in (True, False):  # passes of one kind share a call, and what it prepares
            needs = (needed[0] and sparse[0] is kind, needed[1] and sparse[1] is kind)
            if not any(needs):
                continue
            if kind:
                found = sparse_conv2d_grads(grad, x, weight, ctx.g, ctx.pattern, needs)
            else:
                found = _dense_grads(grad, x, dense, ctx.g, needs, ctx.keep)
            grads = [f if n else g for f, n, g in zip(found, needs, grads, strict=True)]
        grad_bias = grad.sum((0, 2, 3)) if needed[2] else None
        return grads[0], grads[1], grad_bias, None, None, None, None


def _read(path: Path) -> dict[str, dict[str, PassChoice]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return {m: {k: PassChoice(*v) for k, v in c.items()} for m, c in value.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # no file, or a damaged one: measured anew


def _merge(path: Path, machine: str, key: str, choice: PassChoice) -> dict[str, PassChoice]:
    """Add one choice unless it is there; returns this machine's choices. Safe between processes."""
    try:
        import fcntl
    except ImportError as error:  # no POSIX
        raise OSError("file locks are not to be had here") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        machines = _read(path)
        machines.setdefault(machine, {}).setdefault(key, choice)
        plain = {m: {k: list(astuple(v)) for k, v in c.items()} for m, c in machines.items()}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(plain, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    return machines[machine]
