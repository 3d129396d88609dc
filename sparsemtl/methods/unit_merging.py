"""Which hidden units are alike or opposed, and how two of them become one.

Source: Singh, "Analysing Efficiency of Deep Multi-Task Networks Using Distinctiveness Pruning",
Eq. 5 (angles) and 12-15 (merging), after Gedeon and Harris (1992). Of two units within θ of the
same or of opposite direction one is removed and what its readers took from it is taken from the
other: w_px ← w_px + w_py · cos.

N samples, h units, K outputs of a reader. docs/fidelity.md lists what the paper leaves open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsemtl.errors import unknown_choice
from sparsemtl.models.joint import HiddenLayer, Shrunk, keep_units

ACTIVATIONS = ("centred", "raw")
PATTERNS = ("pass", "epoch", "batch")
FACTORS = ("cosine", "least-squares")
ORDERS = ("closest", "index")
ABSORB = ("many", "once")


@dataclass(frozen=True)
class DistinctivenessConfig:
    """When two hidden units are one, and how they become it."""

    theta: float = 30.0  # degrees; the paper's threshold
    warmup: int = 0  # epochs before the first merging; random weights have hardly any features yet
    activations: str = "raw"  # patterns as the readers see them (Eq. 5); centred: minus their mean
    patterns: str = "pass"  # one pass after the epoch; "epoch": collected during it; "batch": last
    pattern_batches: int | None = None  # pass: of the training order; None: all of an epoch
    factor: str = "cosine"  # Eq. 12, which supposes equal norms; least-squares: cos · |h_y|/|h_x|
    order: str = "closest"  # pairs by their angle, or by the units' index
    absorb: str = "many"  # how many units one may take up in a round; "once"
    smallest: int = 1  # units that always stay
    hidden: str = ""  # name of the Linear layer; "": the model's own hidden_layer()
    norm: str = ""  # name of the BatchNorm1d after it, if there is one
    readers: tuple[str, ...] = ()  # names of the Linear layers that read the units

    def __post_init__(self) -> None:
        object.__setattr__(self, "readers", tuple(self.readers))  # JSON knows lists only
        for name, choices in (
            ("activations", ACTIVATIONS),
            ("patterns", PATTERNS),
            ("factor", FACTORS),
            ("order", ORDERS),
            ("absorb", ABSORB),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"DistinctivenessConfig: {unknown_choice(name, getattr(self, name), choices)}"
                )
        if not 0.0 <= self.theta < 90.0:
            raise ValueError(
                f"DistinctivenessConfig: Expected theta in [0, 90) degrees, got {self.theta}"
            )
        if self.warmup < 0:
            raise ValueError(f"DistinctivenessConfig: Expected warmup >= 0, got {self.warmup}")
        for name in ("smallest", "pattern_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"DistinctivenessConfig: Expected {name} >= 1, got {value}")


@dataclass
class Patterns:
    """Second moments of the units' activations, which are all that angles need.

    gram: [h, h] Σ_n h_i h_j    total: [h] Σ_n h_i    samples: N; float64
    """

    gram: Tensor
    total: Tensor
    samples: Tensor

    @classmethod
    def empty(cls, units: int) -> Patterns:
        return cls(
            torch.zeros(units, units, dtype=torch.float64),
            torch.zeros(units, dtype=torch.float64),
            torch.zeros((), dtype=torch.float64),
        )

    @classmethod
    def of(cls, activations: Tensor) -> Patterns:
        """Of [N, h] activations."""
        patterns = cls.empty(activations.shape[1])
        patterns.add(activations)
        return patterns

    def add(self, activations: Tensor) -> None:
        """Add [N, h] activations."""
        wide = activations.detach().double().cpu()
        self.gram += wide.T @ wide
        self.total += wide.sum(dim=0)
        self.samples += len(wide)

    def __add__(self, other: Patterns) -> Patterns:
        return Patterns(*(a + b for a, b in zip(self.tensors(), other.tensors(), strict=True)))

    def tensors(self) -> list[Tensor]:
        return [self.gram, self.total, self.samples]

    def second_moments(self, centred: bool) -> Tensor:
        """[h, h] inner products of the patterns, or of the patterns minus their means."""
        if not centred:
            return self.gram
        return self.gram - torch.outer(self.total, self.total) / self.samples.clamp_min(1.0)


def cosines(moments: Tensor) -> Tensor:
    """Eq. 5 for all pairs: [h, h], in [-1, 1]; 0 beside a unit that is always 0."""
    norm = moments.diagonal().clamp_min(0.0).sqrt()
    product = torch.outer(norm, norm)
    cosine = moments / product.where(product > 0, torch.ones_like(product))
    return cosine.where(product > 0, torch.zeros_like(cosine)).clamp(-1.0, 1.0)


def smallest_angle(patterns: Patterns, config: DistinctivenessConfig) -> float:
    """Degrees between the two least distinct units, opposite ones counting as alike; 90 for one."""
    cosine = cosines(patterns.second_moments(config.activations == "centred")).abs()
    others = cosine[~torch.eye(len(cosine), dtype=torch.bool)]
    return math.degrees(math.acos(float(others.max()))) if len(others) else 90.0


def merge_plan(
    moments: Tensor, config: DistinctivenessConfig
) -> list[tuple[int, int | None, float]]:
    """Who goes: (removed unit y, unit x that takes it up, factor of w_py), in order.

    moments: [h, h] inner products of the patterns. A unit whose pattern is 0 everywhere goes
             without being taken up. Patterns do not change as units merge, so angles stay valid.
    """
    units = len(moments)
    norm = moments.diagonal().clamp_min(0.0).sqrt()
    dead = (norm <= 1e-12 * norm.max()).tolist()
    plan: list[tuple[int, int | None, float]] = []
    plan.extend((y, None, 0.0) for y in range(units) if dead[y])
    del plan[units - config.smallest :]
    gone = {y for y, _, _ in plan}
    cosine = cosines(moments)
    near = math.cos(math.radians(config.theta)) - 1e-12
    first, second = torch.triu_indices(units, units, 1)
    values = cosine[first, second]
    close = (values.abs() >= near).nonzero().squeeze(1)
    if config.order == "closest":
        close = close[torch.argsort(values[close].abs(), descending=True, stable=True)]
    used: set[int] = set()
    for place in close.tolist():
        x, y = int(first[place]), int(second[place])
        if units - len(gone) <= config.smallest:
            break
        if x in gone or y in gone or dead[x] or dead[y]:
            continue
        if config.absorb == "once" and (x in used or y in used):
            continue
        factor = float(values[place])
        if config.factor == "least-squares":
            factor *= float(norm[y] / norm[x])
        plan.append((y, x, factor))
        gone.add(y)
        used.add(x)
    return plan


@torch.no_grad()
def merge_units(
    layer: HiddenLayer, patterns: Patterns, config: DistinctivenessConfig
) -> tuple[list[Shrunk], Tensor]:
    """Merge the units of a layer that are not distinct, by Eq. 12-15; the layer shrinks in place.

    patterns: of the units as the readers take them
    returns:  the parameters that were replaced, none where every unit is distinct; the units
              that stayed
    With centred activations h_y ≈ m_y + f · (h_x - m_x), and what is constant in it goes to the
    readers' biases; Eq. 12 has no such term, as its patterns are not centred.
    """
    centred = config.activations == "centred"
    plan = merge_plan(patterns.second_moments(centred), config)
    if not plan:
        return [], torch.arange(layer.size)
    mean = patterns.total / patterns.samples.clamp_min(1.0)
    for reader in layer.readers:
        weight = reader.weight.double().cpu()  # [K, h]
        constant = torch.zeros(len(weight), dtype=torch.float64)
        for y, x, factor in plan:
            if x is not None:
                weight[:, x] += factor * weight[:, y]
            if centred:
                rest = mean[y] - (factor * mean[x] if x is not None else 0.0)
                constant += weight[:, y] * rest
        reader.weight.copy_(weight)
        if centred:
            _add_bias(reader, constant)
    gone = {y for y, _, _ in plan}
    kept = torch.tensor([u for u in range(layer.size) if u not in gone])
    return keep_units(layer, kept), kept


def _add_bias(reader: nn.Linear, constant: Tensor) -> None:
    if reader.bias is None:
        raise ValueError(
            "distinctiveness: Expected readers with a bias for centred activations, got one without"
        )
    reader.bias.add_(constant.to(reader.bias))
