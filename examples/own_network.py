"""AdapMTL on a network of your own: any module that returns a dict, and a map of its components."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsemtl.data import ScenesConfig, build_dataset
from sparsemtl.methods import AdapMTL, AdapMTLConfig
from sparsemtl.sparsity.stats import sparsity_report
from sparsemtl.tasks import make_task
from sparsemtl.training.evaluate import evaluate
from sparsemtl.training.loop import train
from sparsemtl.training.state import TrainConfig, TrainState

STEPS = 40


class TinyNet(nn.Module):
    """A trunk of four strided convolutions and a 1x1 head per task."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64, 64)
        layers: list[nn.Module] = []
        for c, k in pairwise(widths):
            layers += [nn.Conv2d(c, k, 3, 2, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.depth_head = nn.Conv2d(64, 1, 1)
        self.normals_head = nn.Conv2d(64, 3, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = self.trunk(image)
        return {"depth": self.depth_head(features), "normals": self.normals_head(features)}


def main() -> None:
    torch.manual_seed(0)
    data = ScenesConfig(height=48, width=64, frames_train=64, frames_test=16)
    train_set = build_dataset(data, "train", ["depth", "normals"])
    tasks = {"depth": make_task("depth", "depth", 1), "normals": make_task("normals", "normals", 3)}

    net = TinyNet()
    parts = {"backbone": "trunk", "head:depth": "depth_head", "head:normals": "normals_head"}
    method = AdapMTL(AdapMTLConfig(sparsity=0.8), parts)
    state = TrainState.create(
        net, tasks, train_set, method, TrainConfig(steps=STEPS, batch_size=8), parts
    )
    train(state)

    plain = method.finalize(net)  # a TinyNet again, dense with zeros
    print(evaluate(plain, tasks, build_dataset(data, "test", ["depth", "normals"])))
    report = sparsity_report(plain, state.components)
    print(f"{report.overall:.2%} zeros: {report.components}")


if __name__ == "__main__":
    main()
