"""The multitask network: one shared backbone, one head per task."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import torch
from torch import Tensor, nn

from sparsemtl.models.component import BACKBONE, Component, head_name, layers_of

IMAGE_CHANNELS = 3


class MultitaskModel(nn.Module):
    """A backbone whose features feed one head per task.

    backbone: module [B, 3, H, W] → [B, C, h, w]
    heads:    task name → module [B, C, h, w] → [B, channels, h, w]
    raises:   ValueError without heads, or for a task name that cannot be a module name
    """

    def __init__(self, backbone: nn.Module, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        check_task_names(heads)
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Predict every task.

        x:       [B, 3, H, W], floating point, already normalised
        returns: task → [B, channels, h, w], the backbone's stride smaller than the image
        raises:  ValueError for another shape, TypeError for another dtype
        """
        self._check_image(x)
        features = self.backbone(x)
        return {task: head(features) for task, head in self.heads.items()}

    def components(self) -> dict[str, Component]:
        """Return the backbone and each head, in task order, as they are now."""
        components = {BACKBONE: Component(BACKBONE, layers_of(self.backbone, BACKBONE))}
        for task, head in self.heads.items():
            name = head_name(task)
            components[name] = Component(name, layers_of(head, f"heads.{task}"))
        return components

    def _check_image(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != IMAGE_CHANNELS:
            raise ValueError(
                f"MultitaskModel: Expected image of shape [B, 3, H, W], got {list(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"MultitaskModel: Expected image of a floating-point dtype, got {x.dtype}. "
                "Normalise it first"
            )
        if torch.compiler.is_compiling():
            return  # what follows would only add guards to the captured graph
        if 0 in x.shape[2:]:
            raise ValueError(
                f"MultitaskModel: Expected image with at least one pixel, got {list(x.shape)}"
            )
        weight = next(self.parameters())
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"MultitaskModel: Expected image of the model's dtype {weight.dtype}, "
                f"got {x.dtype}. Cast one of them or run under torch.autocast"
            )
        if self.training:
            self._check_batch_statistics(x)

    def _check_batch_statistics(self, x: Tensor) -> None:
        stride = getattr(self.backbone, "stride", None)
        if not isinstance(stride, int):
            return
        pixels = x.shape[0] * ceil(x.shape[2] / stride) * ceil(x.shape[3] / stride)
        if pixels < 2:
            raise ValueError(
                f"MultitaskModel: Expected image with at least 2 feature pixels per batch while "
                f"training (batch norm needs them), got {pixels} from {list(x.shape)} at stride "
                f"{stride}. Use a larger image or batch, or model.eval()"
            )


def check_task_names(tasks: Mapping[str, object]) -> None:
    """Raise ValueError unless the keys can name the heads of a network."""
    if not tasks:
        raise ValueError("MultitaskModel: Expected at least one head, got none")
    taken = nn.ModuleDict()  # its attributes cannot be keys
    for task in tasks:
        if not isinstance(task, str) or not task or "." in task or hasattr(taken, task):
            raise ValueError(
                "MultitaskModel: Expected task names without dots that are no attribute of "
                f"nn.ModuleDict, got {task!r}. Rename it, for example to {f'{task}_task'!r}"
            )
