"""A model of the registry, pruned to a split by magnitude: what steps and engines are timed on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsemtl.errors import unknown_choice
from sparsemtl.models.component import find_components
from sparsemtl.models.config import MODELS, ModelConfig, build_model
from sparsemtl.models.mtl import MultitaskModel
from sparsemtl.sparsity.mask import check_sparsity, kept_count, top_masks
from sparsemtl.sparsity.structure import ELEMENT, Structure

# AdapMTL's published split of NYUv2 with DeepLab-ResNet34, 90.5 % overall (ACM MM 2024, Table 4)
ADAPMTL_SPLIT = {
    "backbone": 0.717,
    "head:segmentation": 0.932,
    "head:normals": 0.993,
    "head:depth": 0.962,
}
SPLIT_NAME = "adapmtl-split"


def parse_tasks(flag: str, text: str) -> dict[str, int]:
    """«segmentation:40,normals:3,depth:1» → name: channels.   raises: ValueError naming the flag"""
    tasks: dict[str, int] = {}
    for part in text.split(","):
        name, _, channels = part.strip().partition(":")
        if not name or not channels.isdigit() or int(channels) < 1 or name in tasks:
            raise ValueError(
                f"Expected {flag} like segmentation:40,normals:3,depth:1 (each task once, channels "
                f">= 1), got {text!r}"
            )
        tasks[name] = int(channels)
    return tasks


def parse_prune(flag: str, text: str, tasks: Mapping[str, int]) -> dict[str, float]:
    """A fraction of zeros for all, `adapmtl-split`, or component=fraction pairs → per component.

    raises: ValueError naming the flag
    """
    components = ["backbone", *(f"head:{task}" for task in tasks)]
    if text == SPLIT_NAME:
        unknown = [name for name in components if name not in ADAPMTL_SPLIT]
        if unknown:
            raise ValueError(
                f"Expected {flag} {SPLIT_NAME} with tasks of {list(ADAPMTL_SPLIT)[1:]}, "
                f"got {unknown}"
            )
        return {name: ADAPMTL_SPLIT[name] for name in components}
    try:
        if "=" not in text:
            split = dict.fromkeys(components, float(text))
        else:
            pairs = [part.partition("=") for part in text.split(",")]
            split = {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        raise ValueError(
            f"Expected {flag} to be a fraction of zeros, {SPLIT_NAME} or pairs such as "
            f"backbone=0.7,head:depth=0.9, got {text!r}"
        ) from None
    for name, value in split.items():
        if name not in components:
            raise ValueError(unknown_choice(f"a component of {flag}", name, components))
        if not 0.0 <= value < 1.0:
            raise ValueError(f"Expected {flag} in [0, 1), a fraction of zeros, got {value:g}")
    return {name: split.get(name, 0.0) for name in components}


def build(model: str, tasks: Mapping[str, int], seed: int = 0) -> MultitaskModel:
    """A freshly initialised model of the registry.   raises: ValueError for an unknown name"""
    if model not in MODELS:
        raise ValueError(unknown_choice("--model", model, MODELS))
    torch.manual_seed(seed)
    return build_model(ModelConfig(model), tasks)


def magnitude_masks(
    model: nn.Module,
    split: Mapping[str, float],
    *,
    across_layers: bool = False,
    heads: Structure = ELEMENT,
) -> list[list[Tensor]]:
    """Per component, per layer: which weights are among the layer's largest.

    Every layer gets its component's sparsity. A cut across all of a component empties whole layers
    of a fresh model, whose initial scales differ: nobody need compute those, and every speed-up
    would flatter.

    split:         component → fraction of zeros
    across_layers: one cut for a component all the same, as one threshold makes it
    heads:         whole groups of the heads' layers, by their mean magnitude; a layer of fewer
                   channels than a group has loses single weights
    """
    masks = []
    for name, component in find_components(model).items():
        check_sparsity("magnitude_masks", name, split[name])
        scores = [weight.detach().abs() for weight in component.weights]
        if across_layers:
            kept = kept_count(sum(s.numel() for s in scores), split[name])
            masks.append(top_masks([scores], kept)[0][0])
            continue
        structure = heads if name.startswith("head") else ELEMENT
        masks.append([_layer_mask(s, split[name], structure) for s in scores])
    return masks


def _layer_mask(scores: Tensor, sparsity: float, structure: Structure) -> Tensor:
    kept = kept_count(scores.numel(), sparsity)
    rows, columns = scores.shape[0], scores.shape[1]
    if rows < structure.tile.rows or columns < structure.tile.columns:
        structure = ELEMENT
    return structure.masks([[scores]], kept)[0][0][0]


def prune(model: nn.Module, split: Mapping[str, float], heads: Structure = ELEMENT) -> nn.Module:
    """Set all but the largest weights of each layer to 0, in place; returns the model.

    heads: the structure of the heads' zeros
    """
    with torch.no_grad():
        masks_of = magnitude_masks(model, split, heads=heads)
        parts = zip(find_components(model).values(), masks_of, strict=True)
        for component, masks in parts:
            for weight, mask in zip(component.weights, masks, strict=True):
                weight.mul_(mask)
    return model
