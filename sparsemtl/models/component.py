"""Components: which layers share one threshold and one budget.

A component is a named, ordered list of convolutions and linear layers. `MultitaskModel` knows
its own; `find_components` finds those of any other network from a map of names to modules.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn
from torch.nn.parameter import is_lazy

from sparsemtl.errors import unknown_choice

log = logging.getLogger(__name__)

Layer = nn.Conv2d | nn.Linear
ComponentMap = Mapping[str, str | nn.Module | Sequence[str | nn.Module]]

BACKBONE = "backbone"
GROUPINGS = ("component", "one", "two", "layer")


def head_name(task: str) -> str:
    """Return the name of the component that is the head of `task`."""
    return f"head:{task}"


@dataclass(frozen=True)
class Component:
    """Layers that share one threshold and one budget.

    name:   `backbone`, `head:<task>`, or what the component map calls it
    layers: (qualified module name, Conv2d or Linear module), in module order
    """

    name: str
    layers: tuple[tuple[str, nn.Module], ...]

    @property
    def weights(self) -> list[nn.Parameter]:
        """The layers' weights in order, a weight shared by several layers once; no biases."""
        unique = {id(layer.weight): layer.weight for _, layer in self.layers}
        return list(unique.values())  # type: ignore[arg-type]  # checked by find_components

    @property
    def numel(self) -> int:
        """Number of weights, a shared one counted once."""
        return sum(weight.numel() for weight in self.weights)


def find_components(
    model: nn.Module, component_map: ComponentMap | None = None
) -> dict[str, Component]:
    """Find the components of a network.

    model:         any module; `model.components()` is used where no map is given. It may return
                   components or such a map.
    component_map: component name → module name, module, or a sequence of them. A module name
                   stands for that module and everything inside it; "" is the whole model.
    returns:       component name → Component, in the order of the map. Layers that no entry
                   names belong to no component and stay dense; they are logged.
    raises:        TypeError without a map or `components()`; ValueError for a name or a module
                   that the model has not, a layer or a weight in two components, a component
                   without Conv2d or Linear, or a weight that is not a plain parameter.
    """
    if component_map is not None:
        components = _from_map(model, component_map)
    else:
        components = _own_components(model)
    if not components:
        raise ValueError("find_components: Expected at least one component, got none")
    _check_disjoint(components)
    covered = {id(layer) for c in components.values() for _, layer in c.layers}
    dense = [name for name, layer in layers_of(model) if id(layer) not in covered]
    if dense:
        log.info("layers that belong to no component stay dense: %s", ", ".join(dense))
    return components


def layers_of(module: nn.Module, prefix: str = "") -> tuple[tuple[str, nn.Module], ...]:
    """Return (qualified name, layer) of each Conv2d and Linear inside, in module order."""
    return tuple(
        (name, layer)
        for name, layer in module.named_modules(prefix=prefix)
        if isinstance(layer, Layer)
    )


def merge_components(
    components: Mapping[str, Component], how: str = "component"
) -> dict[str, Component]:
    """Regroup components for the ablations: how many thresholds there are.

    how:     "component" (as they are), "one" (a single group `all`), "two" (`backbone` and
             `heads`, the latter everything else), "layer" (one per layer, as STR)
    returns: group name → Component; the same weights, each in exactly one group
    raises:  ValueError for another `how`, or "two" where there is no `backbone` or nothing else
    """
    if how == "component":
        return dict(components)
    if how == "one":
        return {"all": _joined("all", components.values())}
    if how == "two":
        others = [c for name, c in components.items() if name != BACKBONE]
        if BACKBONE not in components or not others:
            raise ValueError(
                "merge_components: Expected a component 'backbone' and at least one other for "
                f"'two', got {list(components)}"
            )
        return {
            BACKBONE: _joined(BACKBONE, [components[BACKBONE]]),
            "heads": _joined("heads", others),
        }
    if how == "layer":
        return _by_layer(components.values())
    raise ValueError(f"merge_components: {unknown_choice('how', how, GROUPINGS)}")


def _joined(name: str, components: Iterable[Component]) -> Component:
    return Component(name, tuple(layer for c in components for layer in c.layers))


def _by_layer(components: Iterable[Component]) -> dict[str, Component]:
    groups: dict[int, list[tuple[str, nn.Module]]] = {}
    for component in components:
        for name, layer in component.layers:  # layers that share a weight share a threshold
            groups.setdefault(id(layer.weight), []).append((name, layer))
    return {layers[0][0]: Component(layers[0][0], tuple(layers)) for layers in groups.values()}


def _own_components(model: nn.Module) -> dict[str, Component]:
    own = getattr(model, "components", None)
    if not callable(own):
        raise TypeError(
            f"find_components: Expected a component map or a model with components(), got "
            f"{type(model).__name__} with neither. Pass a map such as "
            '{"backbone": "encoder", "head:depth": "depth_decoder"}'
        )
    found = own()
    if not isinstance(found, Mapping):
        raise TypeError(
            f"find_components: Expected {type(model).__name__}.components() to return a dict, "
            f"got {type(found).__name__}"
        )
    if not all(isinstance(value, Component) for value in found.values()):
        return _from_map(model, found)
    for component in found.values():
        _check_layers(component)
    return dict(found)


def _from_map(model: nn.Module, component_map: ComponentMap) -> dict[str, Component]:
    if not isinstance(component_map, Mapping):
        raise TypeError(
            f"find_components: Expected component_map to be a dict, got "
            f"{type(component_map).__name__}"
        )
    components = {}
    for name, entry in component_map.items():
        entries = [entry] if isinstance(entry, str | nn.Module) else list(entry)
        wanted = [_resolve(model, name, one) for one in entries]
        inside = {id(layer) for module in wanted for _, layer in layers_of(module)}
        # One walk over the whole model gives its own order and names whatever the entry's form.
        layers = tuple(pair for pair in layers_of(model) if id(pair[1]) in inside)
        components[name] = Component(name, layers)
        _check_layers(components[name])
    return components


def _resolve(model: nn.Module, component: str, entry: str | nn.Module) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(entry, nn.Module):
        if not any(entry is module for module in modules.values()):
            raise ValueError(
                f"find_components: Expected the module of component {component!r} to be part of "
                f"the model, got a {type(entry).__name__} that is not"
            )
        return entry
    if not isinstance(entry, str):
        raise TypeError(
            f"find_components: Expected component {component!r} to be a module name, a module "
            f"or a sequence of them, got {type(entry).__name__}"
        )
    if entry not in modules:
        close = get_close_matches(entry, modules, n=5, cutoff=0.4)
        top = [name for name in modules if name and "." not in name]
        hint = f"Close: {close}" if close else f"Top-level modules: {top}"
        raise ValueError(
            f"find_components: Expected component {component!r} to name a module of the model, "
            f"got {entry!r}. {hint}"
        )
    return modules[entry]


def _check_layers(component: Component) -> None:
    if not component.layers:
        raise ValueError(
            f"find_components: Expected component {component.name!r} to hold at least one "
            "Conv2d or Linear, got none"
        )
    for name, layer in component.layers:
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or is_lazy(weight):
            raise ValueError(
                f"find_components: Expected the weight of layer {name!r} to be an initialised "
                f"nn.Parameter, got {type(weight).__name__}. Remove its parametrization, or run "
                "a lazy layer once"
            )


def _check_disjoint(components: Mapping[str, Component]) -> None:
    owners: dict[int, tuple[str, str]] = {}
    for component in components.values():
        for name, layer in component.layers:
            owner, first = owners.setdefault(id(layer.weight), (component.name, name))
            if owner == component.name:
                continue
            what = f"layer {name!r}" if first == name else f"the weight of {first!r} and {name!r}"
            raise ValueError(
                f"find_components: Expected each weight in one component, got {what} in both "
                f"{owner!r} and {component.name!r}"
            )
