"""Networks that are not ours: as a user may bring them, with no registration."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """A hand-written encoder with skips, in-place writes, and two decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, padding="same", dilation=2)
        self.depth = nn.ConvTranspose2d(16, 1, 2, stride=2)
        self.classes = nn.Linear(16, 5)
        _randomise(self)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu_(self.norm(self.first(x)))
        y = self.second(y)
        y += y.mean((2, 3), keepdim=True)
        features = F.gelu(y)
        pooled = F.adaptive_avg_pool2d(features, 1).flatten(1)
        return {
            "depth": self.depth(features),
            "classes": self.classes(F.dropout(pooled, 0.5, self.training)).log_softmax(1),
        }


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 4, 1)
        self.expand = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)), inplace=True))
        return x * gate.sigmoid()


class TimmStyle(nn.Module):
    """Depthwise blocks with squeeze-and-excite, stochastic depth off, several feature maps out.

    As EfficientNet of timm is written with features_only, then a small decoder on two maps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU(inplace=True)
        )
        self.blocks = nn.ModuleList(self._block(8, stride) for stride in (1, 2))
        self.fuse = nn.Conv2d(16, 8, 1)
        self.heads = nn.ModuleDict({"normals": nn.Conv2d(8, 3, 1), "mask": nn.Conv2d(8, 2, 1)})
        _randomise(self)

    @staticmethod
    def _block(channels: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, 16, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.Hardswish(inplace=True),
            nn.Conv2d(16, 16, 5, stride, 2, groups=16, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(inplace=True),
            SqueezeExcite(16),
            nn.Conv2d(16, channels, 1),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = [self.stem(x)]
        for block in self.blocks:
            y = block(maps[-1])
            maps.append(maps[-1] + y if y.shape == maps[-1].shape else y)
        size = maps[-2].shape[-2:]
        up = F.interpolate(maps[-1], size=size, mode="bilinear", align_corners=False)
        y = self.fuse(torch.cat([maps[-2], up], 1))
        return {name: head(y) for name, head in self.heads.items()}


class Standardised(nn.Module):
    """Weights computed in the forward pass, a size that the model compares, a plain tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("offset", torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std()
        y = F.conv2d(x, weight, self.conv.bias, padding=1) + self.offset
        if x.shape[0] == 1:
            y = 2 * y
        return F.interpolate(F.pixel_shuffle(y, 2), scale_factor=1.5)


def _randomise(module: nn.Module) -> None:
    """Statistics as after training: none at the values that would hide a mistake."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.normal_(part.running_mean)
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.normal_(part.bias)


class AsksAValue(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if x.mean() > 0:  # the line that the error must name
            return {"a": x}
        return {"a": -x}


class LoopsOverAValue(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for _ in range(int(x.max())):  # the line that the error must name
            x = x + 1
        return {"a": x}


class SelectsByValue(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": x[x > 0]}  # the line that the error must name


class LeavesTorch(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": torch.from_numpy(x.numpy() * 2)}  # the line that the error must name


class ConstantOutput(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": x, "b": torch.ones(3)}


class Refuses(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        raise ValueError("this network wants something else")
