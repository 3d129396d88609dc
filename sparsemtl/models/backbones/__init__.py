"""Shared backbones: image in, one feature map out; each says its `out_channels` and stride."""

from sparsemtl.models.backbones.deeplab_resnet import DeepLabResNet
from sparsemtl.models.backbones.mobilenetv2 import MobileNetV2
from sparsemtl.models.backbones.vgg import VGG11

__all__ = ["VGG11", "DeepLabResNet", "MobileNetV2"]
