"""The soft threshold by itself: values, gradients, and which backend computes them."""

from __future__ import annotations

import torch

from sparsemtl.ops import all_ops
from sparsemtl.ops.soft_threshold import soft_threshold, soft_threshold_stats


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 32, 3, 3).mul_(0.05).requires_grad_()
    theta = torch.tensor(-3.0, requires_grad=True)

    shrunk = soft_threshold(weight, torch.sigmoid(theta))
    shrunk.square().sum().backward()
    assert weight.grad is not None
    print(f"{float((shrunk == 0).float().mean()):.1%} of the weights are dead")
    print(f"dL/dθ = {theta.grad:.4f}; dead weights get no gradient:", end=" ")
    print(bool((weight.grad[shrunk == 0] == 0).all()))

    # A whole component in one call, with the number of survivors of each tensor.
    weights = [weight.detach(), torch.randn(10, 64)]
    print("survivors:", soft_threshold_stats(weights, torch.tensor(0.05)).nonzeros.tolist())
    print(all_ops()["soft_threshold"].explain())


if __name__ == "__main__":
    main()
