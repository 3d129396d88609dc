"""The convolutions that are timed: the real layers of our networks, each shape once.

B: batch. C, K: input, output channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.ops.sparse_conv2d_plan import Geometry

NETWORKS = {"deeplab": "deeplab-resnet34", "mobilenetv2": "mobilenetv2"}  # prefix → model
HEADS = {"segmentation": 40, "normals": 3, "depth": 1}
IMAGE = 321


@dataclass(frozen=True)
class ConvCase:
    """One convolution and its input.

    name:     prefix of its network / kernel-channels-… ; times: how often the network holds it
    x, weight: shapes [B, C, H, W] and [K, C / groups, kh, kw]
    """

    name: str
    x: tuple[int, int, int, int]
    weight: tuple[int, int, int, int]
    geometry: Geometry
    times: int = 1

    @property
    def out(self) -> tuple[int, int, int, int]:
        """Shape of the output, [B, K, h, w]."""
        height, width = self.geometry.output_size(self.x[2], self.x[3])
        return self.x[0], self.weight[0], height, width

    @property
    def dense_flops(self) -> int:
        """Two per multiply-add, those on padding included, of one forward pass."""
        batch, rows, height, width = self.out
        _, channels, kh, kw = self.weight
        return 2 * batch * rows * height * width * channels * kh * kw

    def in_bounds(self, mask: Tensor) -> int:
        """Multiply-adds of one forward pass with the live weights of `mask` that read no padding.

        mask: bool, of the weight's shape
        """
        g = self.geometry
        reads = [
            _reads_inside(g.kernel[d], g.stride[d], g.padding[d], g.dilation[d], self.x[d + 2], out)
            for d, out in enumerate(self.out[2:])
        ]
        return self.x[0] * int((mask.sum((0, 1)) * reads[0][:, None] * reads[1][None, :]).sum())

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of conv2d and sparse_conv2d."""
        g = self.geometry
        return {
            "stride": g.stride,
            "padding": g.padding,
            "dilation": g.dilation,
            "groups": g.groups,
        }


@cache
def all_cases() -> dict[str, ConvCase]:
    """Name → case: DeepLab-ResNet34's layers, then MobileNetV2's; three heads, 321×321, batch 1.

    The last one, 512→512 with dilation 2, is in no network: it is there to compare with others.
    """
    found: dict[str, ConvCase] = {}
    for prefix, model in NETWORKS.items():
        for case in network_cases(model, prefix):
            found[case.name] = case
    extra = Geometry((1, 1), (2, 2), (2, 2), (3, 3), 1)
    case = ConvCase("extra/3x3-512-512-d2@41", (1, 512, 41, 41), (512, 512, 3, 3), extra)
    return {**found, case.name: case}


def network_cases(model: str, prefix: str) -> list[ConvCase]:
    """Every distinct convolution of a model of the registry, in the order of its forward pass."""
    with torch.device("meta"):
        network = build_model(ModelConfig(model), HEADS).eval()
        image = torch.empty(1, 3, IMAGE, IMAGE)
    seen: dict[tuple[object, ...], int] = {}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        assert isinstance(layer, nn.Conv2d)
        key = (tuple(inputs[0].shape), tuple(layer.weight.shape), _geometry(layer))
        seen[key] = seen.get(key, 0) + 1

    hooks = [m.register_forward_hook(record) for m in network.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return [
        ConvCase(f"{prefix}/{_name(x, weight, g)}", x, weight, g, times)  # type: ignore[arg-type]
        for (x, weight, g), times in seen.items()
    ]


def _reads_inside(
    kernel: int, stride: int, padding: int, dilation: int, size: int, out: int
) -> Tensor:
    """For each tap along one axis, how many outputs read inside the map: [kernel]."""
    first = torch.arange(out) * stride - padding
    at = first + dilation * torch.arange(kernel)[:, None]
    return ((at >= 0) & (at < size)).sum(1)


def _geometry(layer: nn.Conv2d) -> Geometry:
    assert isinstance(layer.padding, tuple)
    pairs = [(p[0], p[1]) for p in (layer.stride, layer.padding, layer.dilation)]
    kernel = (layer.kernel_size[0], layer.kernel_size[1])
    return Geometry(pairs[0], pairs[1], pairs[2], kernel, layer.groups)


def _name(x: tuple[int, ...], weight: tuple[int, ...], g: Geometry) -> str:
    kernel = f"{g.kernel[0]}x{g.kernel[1]}"
    channels = f"dw-{x[1]}" if g.groups > 1 else f"{x[1]}-{weight[0]}"
    stride = f"-s{g.stride[0]}" if g.stride[0] > 1 else ""
    dilation = f"-d{g.dilation[0]}" if g.dilation[0] > 1 else ""
    return f"{kernel}-{channels}{stride}{dilation}@{x[2]}"
