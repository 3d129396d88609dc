"""Dense or sparse, layer by layer and pass by pass: whichever was measured faster on this machine.

A convolution has three passes: forward, input gradient, weight gradient. For each layer shape and
density bucket all three are timed once, dense against sparse, on the tensors at hand, and then the
layer's whole part of a step: a mask that still moves is packed anew each step, the values of a
fixed one are gathered, and dense passes mask the weight and its gradient. Choices are kept in a
file of this machine (`SPARSEMTL_CACHE`, by default ~/.cache/sparsemtl) and in a run's checkpoints:
the same seed must give the same bits again, and dense and sparse kernels differ in the last ones.
Where the file cannot be written, layers stay dense.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsemtl.ops.masking import mask_into, masked
from sparsemtl.ops.pattern import Pattern, pack_pattern
from sparsemtl.ops.sparse_conv2d_plan import Geometry
from sparsemtl.sparsity.passes import DENSE, PassChoice, chosen_forward, chosen_grads
from sparsemtl.timing import interleave

log = logging.getLogger(__name__)

# Upper ends of density buckets; a layer decides anew when it enters another. Denser stays dense.
BUCKETS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
MARGIN = 0.95  # sparse must be this much faster: noise is no reason to switch
ROUNDS, BUDGET = 5, 2.0  # timed rounds, and seconds after which no further round begins
SPARSE = PassChoice(True, True, True)


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
    """Time the passes that will run, dense against sparse, on these very tensors.

    Passes that alone are faster sparse are picked; then the whole of the layer in a step, with
    what comes beside the passes, is timed with them and without.
    """
    trial = _Trial(x, weight, bias, g, keep)
    begin = time.perf_counter()
    with torch.no_grad():
        calls: dict[str, Callable[[], object]] = {}
        for name in trial.passes:
            for kind, choice in (("dense", DENSE), ("sparse", SPARSE)):
                calls[f"{kind} {name}"] = partial(trial.run, choice, name)
        seconds = {name: t.best for name, t in interleave(calls, ROUNDS, 1, budget=BUDGET).items()}
        won = [p for p in trial.passes if seconds[f"sparse {p}"] < MARGIN * seconds[f"dense {p}"]]
        picked = PassChoice(**dict.fromkeys(won, True))
        if picked.any:
            wholes: dict[str, Callable[[], object]] = {
                "dense": partial(trial.step, DENSE),
                "picked": partial(trial.step, picked),
            }
            timed = interleave(wholes, ROUNDS, 1, budget=BUDGET).items()
            seconds |= {name: t.best for name, t in timed}
            picked = picked if seconds["picked"] < MARGIN * seconds["dense"] else DENSE
    log.info("measured %s in %.2f s: %s", list(weight.shape), time.perf_counter() - begin, seconds)
    return picked


class _Trial:
    """One layer with the tensors of one call, to be timed; `passes` names those that will run."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry, keep: Tensor | None
    ) -> None:
        self.passes = ["forward"]
        if torch.is_grad_enabled():
            self.passes += ["input_grad", "weight_grad"] if x.requires_grad else ["weight_grad"]
        self.x, weight, self.g, self.keep = x.detach(), weight.detach(), g, keep
        self.bias = None if bias is None else bias.detach()
        # Taking turns: a pattern that meets another tensor reads its values again, as in training.
        self.weights = [weight, weight if keep is None else weight.clone()]
        self.dense = weight if keep is None else masked(weight, keep)
        self.pattern = self._pack()
        self.grad = torch.ones_like(self.forward(SPARSE))

    @property
    def weight(self) -> Tensor:
        return self.weights[0]

    def _pack(self) -> Pattern:
        return pack_pattern(
            self.weight, groups=self.g.groups, keep=self.keep, master=self.keep is not None
        )

    def run(self, choice: PassChoice, name: str) -> object:
        """One pass."""
        if name == "forward":
            return self.forward(choice)
        return self.grads(choice, (name == "input_grad", name == "weight_grad"))

    def step(self, choice: PassChoice) -> None:
        """The layer's part of a step: all passes, and what the weight's last change asks for."""
        if self.keep is None:  # dense passes do without, but only a packed mask tells the density
            self.pattern = self._pack()
        else:
            if choice.reads_dense("input_grad" in self.passes):
                mask_into(self.weight, self.keep, self.dense)
            if choice.any:
                self.weights.reverse()
                self.pattern.update(self.weight)
        self.forward(choice)
        self.grads(choice, ("input_grad" in self.passes, "weight_grad" in self.passes))

    def forward(self, choice: PassChoice) -> Tensor:
        return chosen_forward(
            choice, self.x, self.weight, self.dense, self.bias, self.g, self.pattern
        )

    def grads(self, choice: PassChoice, needs: tuple[bool, bool]) -> object:
        return chosen_grads(
            choice,
            self.grad,
            self.x,
            self.weight,
            self.dense,
            self.g,
            self.pattern,
            self.keep,
            needs,
        )


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
