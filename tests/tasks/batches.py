"""Random batches of every kind of task per pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsemtl.tasks import TASKS

CHANNELS = {"segmentation": 5, "normals": 3, "depth": 1, "keypoints": 1, "edges": 1}
# Tasks of one value per pixel; classification, of one per image, has tests of its own.
PIXEL_KINDS = [kind for kind in TASKS if kind != "classification"]


def make_batch(kind, shape=(2, 17, 23), small=(5, 6), seed=0):
    """prediction [B, C, h, w], target and valid [B, .., H, W]"""
    g = torch.Generator().manual_seed(seed)
    batch, height, width = shape
    channels = CHANNELS[kind]
    if kind == "segmentation":
        target = torch.randint(0, channels, shape, generator=g)
    elif kind == "normals":
        target = F.normalize(torch.randn(batch, 3, height, width, generator=g), dim=1)
    else:
        target = torch.rand(batch, 1, height, width, generator=g) * 5 + 0.5
    prediction = torch.randn(batch, channels, *small, generator=g)
    return prediction, target, torch.rand(shape, generator=g) > 0.3
