"""Shared backbones: image in, one feature map out; each says its `out_channels` and stride."""

from sparsemtl.models.backbones.deeplab_resnet import DeepLabResNet
from sparsemtl.models.backbones.mobilenetv2 import MobileNetV2

__all__ = ["DeepLabResNet", "MobileNetV2"]
