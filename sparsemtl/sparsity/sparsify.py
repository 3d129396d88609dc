"""`sparsify` gives a model thresholds; the `Sparsity` module it hangs on the model owns them.

G: threshold groups. A group shares one θ; α = sigmoid(θ). With the default grouping a group is a
component (AdapMTL); the ablations share one θ over all, over the heads, or give one to each layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsemtl.models.component import Component, find_components, merge_components
from sparsemtl.ops.group_threshold import group_threshold_component
from sparsemtl.ops.masking import mask_weight
from sparsemtl.ops.soft_threshold import soft_threshold_component
from sparsemtl.ops.threshold_adam import ready_values
from sparsemtl.sparsity.layers import DENSE_LAYERS, SPARSE_LAYERS, SparseLayer, unique_layers
from sparsemtl.sparsity.ready import ReadyValues
from sparsemtl.sparsity.slot import Slot
from sparsemtl.sparsity.structure import ELEMENT, Structure, n_of_m_mask, parse_structure

GROUPINGS = ("component", "one", "two", "layer")


class Sparsity(nn.Module):
    """Thresholds and masks of one model; `model.sparsity` after `sparsify(model)`.

    theta: [G] float32, learnable; α = sigmoid(θ).
    Before `freeze`, layers compute with S(W, α). After it α is 0, the surviving values have been
    written into W, and layers compute with W where the mask is True and 0 elsewhere.
    """

    theta: nn.Parameter
    sparse_kernels = False  # layers compute with sparse kernels where measured faster
    open = False  # layers compute with W as it is: dense phases, gradients of pruned weights

    def __init__(
        self,
        components: Mapping[str, Component],
        groups: Mapping[str, Component],
        theta: float,
        structure: Structure = ELEMENT,
    ) -> None:
        super().__init__()
        self.structure = structure  # what a threshold shrinks: single weights, or groups of them
        self.components = dict(components)
        self.groups = dict(groups)
        self.theta = nn.Parameter(torch.full((len(self.groups),), float(theta)))
        self.masks: list[list[Tensor]] | None = None  # per group, per layer, bool like the weight
        self._values: list[Sequence[Tensor]] | None = None  # S(W, α) of the forward under way
        self._alpha: Tensor | None = None  # [G], of the same
        self.ready = ReadyValues()  # S(W, α) as an optimizer may have written it

    @property
    def alpha(self) -> Tensor:
        """α per group: [G] float32, differentiable in θ; 0 once frozen."""
        return torch.zeros_like(self.theta) if self.frozen else torch.sigmoid(self.theta)

    @property
    def frozen(self) -> bool:
        return self.masks is not None

    def weights(self, group: int) -> list[nn.Parameter]:
        """The master weights of one group, in module order."""
        return list(self.groups[self.group_names[group]].weights)

    @property
    def group_names(self) -> list[str]:
        return list(self.groups)

    def effective_weight(self, group: int, place: int, weight: Tensor) -> Tensor:
        if self.open:
            return weight
        if self._values is not None:
            return self._values[group][place]
        if self.masks is not None:
            return mask_weight(weight, self.masks[group][place])
        return self._shrink([weight], torch.sigmoid(self.theta[group]))[0]

    def _shrink(self, weights: Sequence[Tensor], alpha: Tensor) -> Sequence[Tensor]:
        """S(W, α) in the model's structure."""
        dtype = _narrow_type(weights)
        if self.structure.grouped:
            return group_threshold_component(weights, alpha, self.structure.tile, dtype=dtype)
        if self.structure.n_of_m is not None:
            weights = [
                torch.where(n_of_m_mask(w.detach().abs(), *self.structure.n_of_m), w, 0.0)
                for w in weights
            ]
        return soft_threshold_component(weights, alpha, dtype=dtype)

    def dead_count(self, group: int, place: int) -> int:
        """How many weights of one layer are dead now."""
        weight = self.weights(group)[place]
        if self.masks is not None:
            return weight.numel() - int(self.masks[group][place].sum())
        dead = self.structure.magnitudes(weight) <= torch.sigmoid(self.theta.detach()[group])
        return int((self.structure.sizes(weight.shape).to(dead.device) * dead).sum())

    def compute_values(self) -> None:
        """Threshold every group whose values are not ready, and keep all until `drop_values`."""
        if self.frozen or self.open:
            return
        alpha = self._alpha = torch.sigmoid(self.theta)
        self._values = [self._group_values(g, alpha[g]) for g in range(len(self.groups))]

    def _group_values(self, group: int, alpha: Tensor) -> Sequence[Tensor]:
        weights = self.weights(group)
        if self.structure != ELEMENT:
            return self._shrink(weights, alpha)
        ready = self.ready.find(group, weights, self.theta)
        if ready is None or not all(map(_same_type, ready.values, weights)):
            return self._shrink(weights, alpha)
        return ready_values(weights, alpha, ready.values)

    def drop_values(self) -> None:
        self._values = self._alpha = None

    def group_alpha(self, group: int) -> Tensor:
        """α of one group, differentiable in θ: that of the forward pass under way, if there is."""
        alpha = torch.sigmoid(self.theta) if self._alpha is None else self._alpha
        return alpha[group]

    def freeze(self, masks: list[list[Tensor]], alpha: Tensor) -> None:
        """Write S(W, α) into W where the mask is True, 0 elsewhere, and fix the masks.

        masks: per group, per layer, bool, shaped like the weight.   alpha: [G]
        """
        self._check_masks(masks)
        with torch.no_grad():
            for g, group_masks in enumerate(masks):
                for weight, mask in zip(self.weights(g), group_masks, strict=True):
                    shrunk = self._shrunk(weight, alpha[g].to(weight))
                    weight.copy_(torch.where(mask, shrunk, shrunk.new_zeros(())))
        self.masks = self._laid_out(masks)
        self.ready.clear()
        self.theta.requires_grad_(False)
        self.theta.grad = None

    def _shrunk(self, weight: Tensor, alpha: Tensor) -> Tensor:
        """W moved towards zero by α, whether alive or not: a mask decides about that."""
        if self.structure.grouped:
            magnitude = self.structure.magnitudes(weight).to(weight.dtype)
            scale = (1.0 - alpha / magnitude).clamp_(min=0.0)
            scale = torch.where(magnitude == 0.0, 0.0, scale)  # its weights are all 0
            return weight * self.structure.expand(scale, weight.shape)
        return torch.copysign(weight.abs().sub_(alpha).clamp_(min=0.0), weight)

    def fix_masks(self, masks: list[list[Tensor]], *, keep_dormant: bool = False) -> None:
        """Prune by these masks from now on; masks that were fixed before may be replaced.

        masks:        per group, per layer, bool, shaped like the weight
        keep_dormant: leave what pruned weights hold in W, where a later mask finds it again;
                      else they become 0
        """
        if keep_dormant:
            self._check_masks(masks)
            self.masks = self._laid_out(masks)
            self.ready.clear()
            self.theta.requires_grad_(False)
        else:
            self.freeze(masks, torch.zeros_like(self.theta))
        self.open = False

    def lay_out_for_kernels(self) -> None:
        """Make every weight contiguous, in which form the sparse kernels read it without a copy.

        Before an optimizer is made: its state lies in memory as the weights do.
        """
        for group in range(len(self.groups)):
            for weight in self.weights(group):
                # The CPU's kernels read rows of channels, those of a GPU channels of pixels.
                images = weight.is_cuda and weight.dim() == 4
                layout = torch.channels_last if images else torch.contiguous_format
                # By its strides: a contiguous 1x1 kernel can still say channels_last, and torch
                # would lay out the outputs, and every gradient after them, accordingly.
                laid_out = torch.empty_like(weight.data, memory_format=layout)
                if laid_out.stride() != weight.stride():
                    weight.data = laid_out.copy_(weight.data)
        if self.masks is not None:
            self.masks = self._laid_out(self.masks)

    def _laid_out(self, masks: list[list[Tensor]]) -> list[list[Tensor]]:
        """The masks, each on its weight's device and in its memory format: read in step with it."""
        return [
            [_laid_out_like(m, w) for m, w in zip(group, self.weights(g), strict=True)]
            for g, group in enumerate(masks)
        ]

    def _check_masks(self, masks: list[list[Tensor]]) -> None:
        found = [[tuple(m.shape) for m in group] for group in masks]
        expected = [[tuple(w.shape) for w in self.weights(g)] for g in range(len(self.groups))]
        if found != expected:
            raise ValueError(
                "Sparsity: Expected masks shaped like the weights of "
                f"{self.group_names}, got {sum(map(len, found))} masks of other shapes"
            )
        for group in masks:
            for mask in group:
                if mask.dtype != torch.bool:
                    raise ValueError(f"Sparsity: Expected bool masks, got {mask.dtype}")

    def effective_weights(self) -> Iterator[tuple[str, str, Tensor]]:
        """(component, layer name, effective weight, detached) of every prunable layer."""
        with torch.no_grad():
            for name, component in self.components.items():
                for layer, module in unique_layers(component):
                    assert isinstance(module, SparseLayer)
                    yield name, layer, module.effective_weight().detach()

    def forward(self, value: Any) -> Any:
        """The value itself: an nn.Sequential runs its children, of which this is now one."""
        return value

    def resume_state(self) -> dict[str, Any]:
        """θ and the masks, for a checkpoint. (The model's own state dict stays a dense model's.)"""
        return {
            "theta": self.theta.detach().clone(),
            "groups": self.group_names,
            "masks": self.masks,
        }

    def load_resume_state(self, state: Mapping[str, Any]) -> None:
        if list(state["groups"]) != self.group_names:
            raise ValueError(
                f"Sparsity: Expected the groups {self.group_names}, got {list(state['groups'])}"
            )
        masks = state["masks"]
        with torch.no_grad():
            self.theta.copy_(state["theta"])
        if masks is not None:
            self._check_masks(masks)
            masks = self._laid_out(masks)
        self.masks = masks
        self.theta.requires_grad_(masks is None)

    def _apply(self, fn: Any, recurse: bool = True) -> Sparsity:
        super()._apply(fn, recurse)
        if self.masks is not None:  # `fn` may change dtypes: move the masks, keep them bool
            device = self.theta.device
            self.masks = [[m.to(device) for m in group] for group in self.masks]
        return self


def sparsify(
    model: nn.Module,
    components: Mapping[str, Any] | None = None,
    *,
    grouping: str = "component",
    theta_init: float = -20.0,
    structure: str | Structure = ELEMENT,
) -> nn.Module:
    """Give `model` learnable soft thresholds, in place; returns the model.

    model:      any nn.Module; its prunable layers are nn.Conv2d and nn.Linear.
    components: name → module-name prefix(es) or module(s); `model.components()` by default.
    grouping:   who shares a threshold: "component" (AdapMTL), "one" (all), "two" (backbone, heads),
                "layer" (STR).
    theta_init: θ of every group before training; −20 in the paper (α = 2e-9).
    structure:  what lives or dies together: "element" (the paper), "vector(V)", "block(BO, BI)",
                "channel" or "N:M"; a group is alive if its root mean square is above α.
    raises:     ValueError if already sparsified, or for an unknown grouping, structure or
                component; TypeError for a layer that is neither nn.Conv2d nor nn.Linear itself.
    source:     AdapMTL, Eq. 2.
    """
    taken = getattr(model, "sparsity", None)
    if taken is not None:
        got = (
            "one already sparsified"
            if isinstance(taken, Sparsity)
            else f"one whose own `sparsity` is a {type(taken).__name__}; rename it"
        )
        raise ValueError(f"sparsify: Expected a model without an attribute `sparsity`, got {got}")
    if grouping not in GROUPINGS:
        raise ValueError(f"sparsify: Expected grouping in {list(GROUPINGS)}, got {grouping!r}")
    structure = parse_structure(structure)
    if not math.isfinite(theta_init):
        raise ValueError(f"sparsify: Expected theta_init to be finite, got {theta_init}")
    found = find_components(model, components)
    groups = merge_components(found, grouping)
    for component in found.values():
        for layer, module in component.layers:
            if type(module) not in SPARSE_LAYERS:
                raise TypeError(
                    f"sparsify: Expected nn.Conv2d or nn.Linear in component {component.name!r}, "
                    f"got {type(module).__name__} at {layer!r}"
                )
    sparsity = Sparsity(found, groups, theta_init, structure)
    device = next(iter(next(iter(found.values())).weights)).device
    sparsity.to(device)
    for g, group in enumerate(groups.values()):
        place = {id(weight): i for i, weight in enumerate(group.weights)}
        for _, module in group.layers:
            module.__class__ = SPARSE_LAYERS[type(module)]
            module.slot = Slot(sparsity, g, place[id(module.weight)])  # type: ignore[assignment]
    model.sparsity = sparsity
    model.register_forward_pre_hook(_compute_values)
    model.register_forward_hook(_drop_values, always_call=True)
    model.register_state_dict_post_hook(_forget_sparsity_keys)
    model.register_load_state_dict_post_hook(_ignore_sparsity_keys)
    return model


def desparsify(model: nn.Module) -> nn.Module:
    """Undo `sparsify`, in place: plain torch layers again, weights as they are."""
    for module in model.modules():
        if isinstance(module, SparseLayer):
            del module.slot
            object.__setattr__(module, "__class__", DENSE_LAYERS[type(module)])
    for hooks, ours in (
        (model._forward_pre_hooks, _compute_values),
        (model._forward_hooks, _drop_values),
        (model._state_dict_hooks, _forget_sparsity_keys),
        (model._load_state_dict_post_hooks, _ignore_sparsity_keys),
    ):
        for key in [k for k, hook in hooks.items() if hook is ours]:
            del hooks[key]
            model._forward_hooks_always_called.pop(key, None)
    del model.sparsity
    return model


def _laid_out_like(mask: Tensor, weight: Tensor) -> Tensor:
    if mask.device == weight.device and mask.stride() == weight.stride():
        return mask
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask)


def _narrow_type(weights: Sequence[Tensor]) -> torch.dtype | None:
    """On a GPU under autocast, the type in which layers compute: one pass shrinks and narrows."""
    if not weights[0].is_cuda or torch.compiler.is_compiling():
        return None
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def _same_type(value: Tensor, weight: Tensor) -> bool:
    """Whether a layer would compute with the same bits: narrow values are for autocast alone."""
    if value.dtype is weight.dtype:
        return True
    kind = value.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is value.dtype


def _compute_values(model: nn.Module, _inputs: Any) -> None:
    if not torch.compiler.is_compiling():  # a traced model thresholds layer by layer
        model.sparsity.compute_values()  # type: ignore[union-attr, operator]


def _drop_values(model: nn.Module, _inputs: Any, _outputs: Any) -> None:
    if not torch.compiler.is_compiling():
        model.sparsity.drop_values()  # type: ignore[union-attr, operator]


def _forget_sparsity_keys(
    model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}sparsity.")]:
        del state[key]


def _ignore_sparsity_keys(model: nn.Module, incompatible: Any) -> None:
    ours = [k for k in incompatible.missing_keys if k.split(".")[-2:] == ["sparsity", "theta"]]
    for key in ours:
        incompatible.missing_keys.remove(key)
