"""DeepLab-ResNet18 and 34: basic blocks, dilated from stage 3 on, output stride 8.

The network shared by AdaShare, DiSparse and AdapMTL. Modules are registered in the order stem,
blocks stage by stage, shortcuts: methods that weight layers by index rely on this order, in
which the three 1x1 shortcut convolutions come last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sparsemtl.models.width import scaled

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
CHANNELS = (64, 128, 256, 512)
STRIDES = (1, 2, 1, 1)
DILATIONS = (1, 1, 2, 4)
INIT_STD = 0.01  # of every convolution; batch norm follows each, so the scale only sets the step


class BasicBlock(nn.Sequential):
    """Two 3x3 convolutions with batch norm; the skip and the last ReLU are the backbone's."""

    def __init__(self, in_channels: int, channels: int, stride: int, dilation: int) -> None:
        super().__init__(
            _conv3x3(in_channels, channels, stride, dilation),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            _conv3x3(channels, channels, 1, dilation),
            nn.BatchNorm2d(channels),
        )


class DeepLabResNet(nn.Module):
    """Residual backbone with output stride 8.

    depth: 18 or 34
    width: multiplies every channel count
    input: [B, 3, H, W], any H, W ≥ 1
    output: [B, 512 * width, h, w], h about H / 8 (224 → 29, 321 → 41: the pooling rounds up)
    """

    stride = 8

    def __init__(self, depth: int = 34, width: float = 1.0) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(
                f"DeepLabResNet: Expected depth to be one of {list(BLOCKS)}, got {depth}"
            )
        channels = [scaled(c, width) for c in CHANNELS]
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True),
        )
        self.stages = _stages(BLOCKS[depth], channels)
        self.shortcuts = _shortcuts(channels)
        self.out_channels = channels[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for blocks, shortcut in zip(self.stages, self.shortcuts, strict=True):
            residual = shortcut(x)
            for block in blocks:  # type: ignore[attr-defined]  # a ModuleList forgets its type
                x = F.relu(residual + block(x))
                residual = x
        return x


def _stages(depths: Sequence[int], channels: Sequence[int]) -> nn.ModuleList:
    stages = nn.ModuleList()
    before = channels[0]
    for depth, after, stride, dilation in zip(depths, channels, STRIDES, DILATIONS, strict=True):
        first = BasicBlock(before, after, stride, dilation)
        rest = [BasicBlock(after, after, 1, dilation) for _ in range(depth - 1)]
        stages.append(nn.ModuleList([first, *rest]))
        before = after
    return stages


def _shortcuts(channels: Sequence[int]) -> nn.ModuleList:
    """One per stage, used by its first block: 1x1 where the shape or the dilation changes."""
    shortcuts = nn.ModuleList()
    before = channels[0]
    for after, stride, dilation in zip(channels, STRIDES, DILATIONS, strict=True):
        if stride != 1 or before != after or dilation in (2, 4):
            conv = nn.Conv2d(before, after, 1, stride=stride, bias=False)
            shortcuts.append(nn.Sequential(conv, nn.BatchNorm2d(after)))
        else:
            shortcuts.append(nn.Identity())
        before = after
    return shortcuts


def _conv3x3(in_channels: int, channels: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, channels, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    )
