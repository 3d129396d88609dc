"""VGG-11's convolutions, with batch norm and without its classifier."""

from __future__ import annotations

from torch import Tensor, nn

from sparsemtl.models.width import scaled

STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))  # a max-pool of 2 after each


class VGG11(nn.Module):
    """Eight 3x3 convolutions in five stages; output stride 32; no classifier.

    width:  multiplies every channel count
    input:  [B, 3, H, W], H and W ≥ 32
    output: [B, 512 * width, H / 32, W / 32]
    """

    stride = 32

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for stage in STAGES:
            for channels in stage:
                after = scaled(channels, width)
                layers += [
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                ]
                before = after
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.out_channels = before
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x)
        return features
