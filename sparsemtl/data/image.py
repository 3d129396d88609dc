"""Image normalisations by name, and their inverse.

caffe_bgr: BGR order, 0..255, minus the mean pixel; no division (AdaShare, DiSparse, AdapMTL)
imagenet:  RGB order, /255, minus the ImageNet mean, divided by its standard deviation
unit:      RGB order, /255 (MTAN, LibMTL)
"""

from __future__ import annotations

import torch
from torch import Tensor

CAFFE_BGR_MEAN = (104.00698793, 116.66876762, 122.67891434)  # of 0..255 values, in BGR order
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of [0, 1] values, in RGB order
IMAGENET_STD = (0.229, 0.224, 0.225)
NORMALISATIONS = ("caffe_bgr", "imagenet", "unit")


def check_normalisation(who: str, name: str) -> None:
    """raises: ValueError listing the choices if `name` is not a normalisation."""
    if name not in NORMALISATIONS:
        raise ValueError(f"{who}: Expected image_normalisation in {NORMALISATIONS}, got {name!r}")


def normalise(image: Tensor, name: str) -> Tensor:
    """[..., 3, H, W] RGB in 0..255, any dtype -> float32 of the same shape, see the module."""
    check_normalisation("normalise", name)
    image = image.to(torch.float32)
    if name == "caffe_bgr":
        return image.flip(-3) - _channels(CAFFE_BGR_MEAN, image)
    if name == "imagenet":
        return (image / 255.0 - _channels(IMAGENET_MEAN, image)) / _channels(IMAGENET_STD, image)
    return image / 255.0


def denormalise(image: Tensor, name: str) -> Tensor:
    """[..., 3, H, W] as `normalise` made it -> RGB in [0, 1] (clipped), float32."""
    check_normalisation("denormalise", name)
    image = image.to(torch.float32)
    if name == "caffe_bgr":
        image = ((image + _channels(CAFFE_BGR_MEAN, image)) / 255.0).flip(-3)
    elif name == "imagenet":
        image = image * _channels(IMAGENET_STD, image) + _channels(IMAGENET_MEAN, image)
    return image.clamp(0.0, 1.0)


def _channels(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(3, 1, 1)
