"""Which network to build: the registry, its config and `build_model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from sparsemtl.errors import unknown_choice
from sparsemtl.models.backbones import VGG11, DeepLabResNet, MobileNetV2
from sparsemtl.models.heads import HIDDEN, RATES, ASPPHead
from sparsemtl.models.joint import ACTIVATIONS, JointClassifier
from sparsemtl.models.mtl import MultitaskModel, check_task_names
from sparsemtl.models.width import scaled

MODELS: dict[str, Callable[[float], nn.Module]] = {  # width → backbone
    "deeplab-resnet18": partial(DeepLabResNet, 18),
    "deeplab-resnet34": partial(DeepLabResNet, 34),
    "mobilenetv2": MobileNetV2,
    "vgg11": VGG11,
}
HEADS = ("aspp", "joint")


@dataclass(frozen=True)
class ModelConfig:
    """A shared backbone with a head per task: ASPP, or linear on one joint representation."""

    name: str = "deeplab-resnet34"
    width: float = 1.0  # multiplies every channel count, the heads' hidden 1024 too
    dropout: float = 0.5  # probability inside the heads
    rates: tuple[int, ...] = RATES  # dilation of each branch of a head
    head: str = "aspp"  # "joint": pooled features → hidden units → a linear layer per task
    hidden: int = 128  # joint: units of the representation that the tasks share
    activation: str = "none"  # joint: of the hidden units, after batch norm; relu, tanh, sigmoid

    def __post_init__(self) -> None:
        object.__setattr__(self, "rates", tuple(self.rates))  # JSON knows lists only
        if self.name not in MODELS:
            raise ValueError(f"ModelConfig: {unknown_choice('model name', self.name, MODELS)}")
        for name, choices in (("head", HEADS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"ModelConfig: {unknown_choice(name, getattr(self, name), choices)}"
                )
        if not isinstance(self.hidden, int) or self.hidden < 1:
            raise ValueError(f"ModelConfig: Expected hidden >= 1, got {self.hidden}")
        if not 0.0 < self.width < float("inf"):
            raise ValueError(f"ModelConfig: Expected width > 0, got {self.width}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"ModelConfig: Expected dropout in [0, 1), got {self.dropout}")
        if not self.rates or any(not isinstance(r, int) or r < 1 for r in self.rates):
            raise ValueError(
                f"ModelConfig: Expected rates to be one or more integers ≥ 1, got {self.rates}"
            )


def build_model(config: ModelConfig, heads: Mapping[str, int]) -> MultitaskModel:
    """Build a network with freshly initialised weights (torch's global generator).

    heads:   task name → output channels, in task order
    returns: MultitaskModel
    raises:  ValueError for no heads, a bad task name or fewer than one channel
    """
    check_task_names(heads)
    for task, channels in heads.items():
        if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
            raise ValueError(
                f"build_model: Expected head {task!r} to have at least 1 channel, got {channels}"
            )
    backbone = MODELS[config.name](config.width)
    if config.head == "joint":
        return JointClassifier(
            backbone,
            backbone.out_channels,  # type: ignore[arg-type]  # every backbone has it, as int
            heads,
            config.hidden,
            config.activation,
        )
    hidden = scaled(HIDDEN, config.width)
    return MultitaskModel(
        backbone,
        {
            task: ASPPHead(backbone.out_channels, channels, hidden, config.rates, config.dropout)  # type: ignore[arg-type]  # every backbone in MODELS has it, as int
            for task, channels in heads.items()
        },
    )
