"""The encoder-decoder classifier: backbone → one joint representation → a linear layer per task.

Source: Singh, "Analysing Efficiency of Deep Multi-Task Networks Using Distinctiveness Pruning",
Sec. 2.1 and 4: a fully connected layer of 128 units followed by batch norm, one fully connected
layer per task. Its activation σ is not said; "none" is the default here, because with batch norm
last the units are signed, of equal norm and centred, as its Eq. 7 and 14-15 suppose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sparsemtl.errors import unknown_choice
from sparsemtl.models.component import BACKBONE, Component, head_name, layers_of
from sparsemtl.models.mtl import MultitaskModel

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


@dataclass(frozen=True)
class HiddenLayer:
    """A layer of hidden units: who computes them, and who reads them.

    producer: Linear [d → h]    norm: BatchNorm1d over the h units, or None
    readers:  Linear layers [h → k] that take the units as they are: nothing else reads them
    """

    producer: nn.Linear
    norm: nn.BatchNorm1d | None
    readers: tuple[nn.Linear, ...]

    @property
    def size(self) -> int:
        return self.producer.out_features


class JointClassifier(MultitaskModel):
    """A backbone, its pooled features, a joint representation, and a linear head per task.

    backbone: [B, 3, H, W] → [B, features, h, w]
    heads:    task name → number of classes
    hidden:   units of the joint representation
    forward:  [B, 3, H, W] → task → [B, classes, 1, 1]
    """

    def __init__(
        self,
        backbone: nn.Module,
        features: int,
        heads: Mapping[str, int],
        hidden: int = 128,
        activation: str = "none",
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"JointClassifier: {unknown_choice('activation', activation, ACTIVATIONS)}"
            )
        readers = {task: nn.Linear(hidden, classes) for task, classes in heads.items()}
        super().__init__(backbone, readers)
        self.joint = nn.Linear(features, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self._check_image(x)
        pooled = self.backbone(x).mean(dim=(2, 3))  # [B, features]
        units = self.activation(self.norm(self.joint(pooled)))  # [B, hidden]
        return {task: head(units)[:, :, None, None] for task, head in self.heads.items()}

    def components(self) -> dict[str, Component]:
        """The encoder (convolutions and joint layer) and each head."""
        encoder = (*layers_of(self.backbone, BACKBONE), ("joint", self.joint))
        heads = {
            head_name(task): Component(head_name(task), ((f"heads.{task}", head),))
            for task, head in self.heads.items()
        }
        return {BACKBONE: Component(BACKBONE, encoder), **heads}

    def hidden_layer(self) -> HiddenLayer:
        """The joint representation, for methods that change its size."""
        readers = tuple(head for head in self.heads.values() if isinstance(head, nn.Linear))
        return HiddenLayer(self.joint, self.norm, readers)


@dataclass(frozen=True)
class Shrunk:
    """A parameter before and after its dimension `dim` was cut to the units that stayed."""

    old: nn.Parameter
    new: nn.Parameter
    dim: int


def keep_units(layer: HiddenLayer, kept: Tensor) -> list[Shrunk]:
    """Shrink a hidden layer to some of its units, in place.

    kept:    [h'] int64, indices of the units that stay, ascending
    returns: the parameters that were replaced, for whoever mirrors them. They are new objects:
             a graph that is still alive remembers the old ones' shapes.
    """
    shrunk = _cut(layer.producer, 0, kept)
    layer.producer.out_features = len(kept)
    norm = layer.norm
    if norm is not None:
        shrunk += _cut(norm, 0, kept)
        norm.num_features = len(kept)
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean = norm.running_mean[kept].clone()
            norm.running_var = norm.running_var[kept].clone()
    for reader in layer.readers:
        shrunk += _cut(reader, 1, kept)
        reader.in_features = len(kept)
    return shrunk


def _cut(module: nn.Module, dim: int, kept: Tensor) -> list[Shrunk]:
    """Replace the module's own parameters that have the dimension."""
    shrunk = []
    for name, old in list(module.named_parameters(recurse=False)):
        if old.dim() > dim:
            data = old.detach().index_select(dim, kept.to(old.device))
            new = nn.Parameter(data, requires_grad=old.requires_grad)
            setattr(module, name, new)
            shrunk.append(Shrunk(old, new, dim))
    return shrunk
