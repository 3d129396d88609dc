"""`finalize`: from a sparsified model to a plain one whose pruned weights are zeros."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sparsemtl.sparsity.sparsify import Sparsity, desparsify


def finalize(model: nn.Module, *, in_place: bool = False) -> nn.Module:
    """A plain dense-with-zeros model that computes what the sparsified one computes.

    Ordinary torch layers, ordinary state-dict keys; every weight is S(W, α), or the masked weight.
    raises: ValueError if the model was not sparsified.
    """
    if not isinstance(getattr(model, "sparsity", None), Sparsity):
        raise ValueError("finalize: Expected a sparsified model (see sparsify), got a plain one")
    model = model if in_place else copy.deepcopy(model)
    modules = dict(model.named_modules())
    sparsity = model.sparsity
    assert isinstance(sparsity, Sparsity)
    with torch.no_grad():
        for _, layer, value in list(sparsity.effective_weights()):
            weight = modules[layer].weight
            assert isinstance(weight, torch.Tensor)
            weight.copy_(value)
    return desparsify(model)
