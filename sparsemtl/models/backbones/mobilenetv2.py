"""MobileNetV2 without its classifier: output stride 32, 1280 channels, no dilation.

Source: Sandler et al., CVPR 2018; the truncation is AdapMTL's.
"""

from __future__ import annotations

from math import sqrt

from torch import Tensor, nn

from sparsemtl.models.width import scaled

STEM_CHANNELS = 32
OUT_CHANNELS = 1280
STAGES = (  # expansion, channels, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a skip where the shape is kept."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        expand = [] if expansion == 1 else [_conv_bn_relu(in_channels, hidden, 1)]
        self.layers = nn.Sequential(
            *expand,
            _conv_bn_relu(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.has_skip = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return x + out if self.has_skip else out


class MobileNetV2(nn.Module):
    """Inverted-residual backbone with output stride 32.

    width: multiplies every channel count, the last 1280 too
    input: [B, 3, H, W], any H, W ≥ 1
    output: [B, 1280 * width, h, w], h = ⌈H / 32⌉ (224 → 7, 321 → 11)
    """

    stride = 32

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = scaled(STEM_CHANNELS, width)
        layers: list[nn.Module] = [_conv_bn_relu(3, channels, 3, stride=2)]
        for expansion, stage_channels, blocks, stage_stride in STAGES:
            after = scaled(stage_channels, width)
            for i in range(blocks):
                stride = stage_stride if i == 0 else 1
                layers.append(InvertedResidual(channels, after, stride, expansion))
                channels = after
        self.out_channels = scaled(OUT_CHANNELS, width)
        layers.append(_conv_bn_relu(channels, self.out_channels, 1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, sqrt(2.0 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def _conv_bn_relu(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            channels,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(channels),
        nn.ReLU6(),
    )
