"""Prune a trained checkpoint to an exact sparsity by magnitude and save it under the same keys."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sparsemtl.models.config import ModelConfig, build_model
from sparsemtl.sparsity.controller import freeze_exactly
from sparsemtl.sparsity.finalize import finalize
from sparsemtl.sparsity.sparsify import sparsify
from sparsemtl.sparsity.stats import sparsity_report


def main() -> None:
    torch.manual_seed(0)
    heads = {"segmentation": 13, "depth": 1}
    config = ModelConfig("deeplab-resnet18", width=0.25)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "dense.safetensors"
        save_file(build_model(config, heads).state_dict(), checkpoint)  # stands for your own

        model = build_model(config, heads)
        model.load_state_dict(load_file(checkpoint))
        sparsify(model, grouping="layer")  # the same relative threshold in each layer's group
        freeze_exactly(model.sparsity, 0.9, floor=0.2)  # no layer below 2 % density
        pruned = finalize(model)

        report = sparsity_report(pruned, pruned.components())
        print(f"{report.zeros} of {report.weights} weights are 0: {report.overall:.4%}")
        save_file(pruned.state_dict(), Path(folder) / "pruned.safetensors")
        build_model(config, heads).load_state_dict(load_file(Path(folder) / "pruned.safetensors"))


if __name__ == "__main__":
    main()
