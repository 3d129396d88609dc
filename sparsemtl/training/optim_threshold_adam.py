"""ThresholdAdam: Adam that leaves behind the S(W, α) which the next forward computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparsemtl.ops.layout import laid_out_like
from sparsemtl.ops.soft_threshold import ThresholdStats
from sparsemtl.ops.threshold_adam import AdamRule, threshold_adam
from sparsemtl.sparsity.ready import ReadyGroup
from sparsemtl.sparsity.sparsify import Sparsity
from sparsemtl.sparsity.structure import ELEMENT

VALUE_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_WHO = "ThresholdAdam"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Stepped:
    """One parameter of a step, with what `threshold_adam` needs of it."""

    weight: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    rule: AdamRule


class ThresholdAdam(Optimizer):
    """torch.optim.Adam, or AdamW, and S(W, α) for the next forward in the same pass over memory.

    params:       as any optimizer of torch takes them; groups may differ in lr, betas, eps,
                  weight_decay and decoupled_weight_decay. θ is one of them where it is to learn.
    sparsity:     `model.sparsity` after `sparsify(model)`; None for Adam alone
    value_dtype:  type of S; None: the weights'. bfloat16 is used under autocast to bfloat16 alone
    raises:       ValueError, TypeError for numbers out of range and parameters it cannot step

    A step updates θ first, whose gradient is complete by then, then every other parameter, and
    writes S with the new θ for each group of `sparsity` whose weights were all stepped. The
    forward uses it if neither θ nor a weight has changed since, and thresholds anew if one has.
    The state has the names of Adam's: `exp_avg`, `exp_avg_sq` and `step` of each parameter, so a
    state dict of one continues in the other. Without effect on results: only time is saved.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        sparsity: Sparsity | None = None,
        value_dtype: torch.dtype | None = None,
    ) -> None:
        if sparsity is not None and not isinstance(sparsity, Sparsity):
            raise TypeError(
                f"{_WHO}: Expected sparsity to be a model's Sparsity or None, "
                f"got {type(sparsity).__name__}"
            )
        if value_dtype is not None and value_dtype not in VALUE_TYPES:
            raise ValueError(
                f"{_WHO}: Expected value_dtype in {list(VALUE_TYPES)} or None, got {value_dtype}"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        _rule(defaults, 1)
        self._sparsity, self._value_dtype = sparsity, value_dtype
        self._written: dict[tuple[torch.device, torch.dtype], _Written] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; numbers and parameters are checked."""
        _rule({**self.defaults, **param_group}, 1)
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if not param.is_floating_point() or param.layout is not torch.strided:
                del self.param_groups[-1]
                raise TypeError(
                    f"{_WHO}: Expected strided parameters of a real floating type, "
                    f"got {param.layout} {param.dtype}"
                )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step every parameter that has a gradient.

        closure: computes the loss and its gradients anew; its result is returned
        raises:  TypeError for a sparse gradient
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            stepped, groups = self._collect(), self._thresholds()
            # θ is among these: it must have moved before S is written.
            for alike in _by_kind([s for s in stepped if id(s.weight) not in groups]):
                threshold_adam(*_columns(alike))
            self._step_thresholded([s for s in stepped if id(s.weight) in groups], groups)
        return loss

    def _collect(self) -> list[_Stepped]:
        """Count the step of every parameter with a gradient; parameters in the groups' order."""
        found = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        for _, param in found:
            if param.grad.layout is not torch.strided:
                raise TypeError(
                    f"{_WHO}: Expected dense gradients, got {param.grad.layout} for a "
                    f"parameter of shape {list(param.shape)}"
                )
        rules: dict[tuple[int, int], AdamRule] = {}
        stepped = []
        for group, param in found:
            state = self._advance(param)
            count = int(state["step"].item())
            if (id(group), count) not in rules:
                rules[id(group), count] = _rule(group, count)
            rule = rules[id(group), count]
            stepped.append(_Stepped(param, param.grad, state["exp_avg"], state["exp_avg_sq"], rule))
        return stepped

    def _advance(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key in _MOMENTS:
                state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
        state["step"] += 1
        for key in _MOMENTS:  # the parameter's strides change with model.to(memory_format=…)
            state[key] = laid_out_like(state[key], param)
        return state

    def _thresholds(self) -> dict[int, int]:
        """id of a weight → the group whose θ shrinks it; empty where none does."""
        sparsity = self._sparsity
        if sparsity is None or sparsity.frozen or sparsity.structure != ELEMENT:
            self._written.clear()
            return {}
        return {id(w): g for g in range(len(sparsity.groups)) for w in sparsity.weights(g)}

    def _step_thresholded(self, stepped: list[_Stepped], groups: Mapping[int, int]) -> None:
        """Step the weights of `groups` and offer S to the sparsity that they belong to."""
        if self._sparsity is None:
            return
        alpha = torch.sigmoid(self._sparsity.theta)
        for alike in _by_kind(stepped):
            weights = [s.weight for s in alike]
            owners = [groups[id(weight)] for weight in weights]
            device, kind = weights[0].device, (weights[0].device, weights[0].dtype)
            written = self._written.get(kind)
            out = threshold_adam(
                *_columns(alike),
                alpha.to(device),
                owners,
                dtype=self._value_dtype,
                bitmask=True,
                out=written.out if written is not None and written.fits(weights) else None,
            )
            self._written[kind] = _Written(weights, out)
            self._offer(self._sparsity, weights, out)

    def _offer(self, sparsity: Sparsity, weights: list[Tensor], out: ThresholdStats) -> None:
        assert out.bitmasks is not None
        place = {id(weight): i for i, weight in enumerate(weights)}
        for group in range(len(sparsity.groups)):
            own = sparsity.weights(group)
            places = [place[id(weight)] for weight in own if id(weight) in place]
            if len(places) < len(own):
                continue  # a weight without a gradient: its S moved with θ and was not written
            found = ReadyGroup(
                tuple(out.values[i] for i in places),
                out.nonzeros[places],
                tuple(out.bitmasks[i] for i in places),
            )
            sparsity.ready.offer(group, own, sparsity.theta, found)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state dict of ThresholdAdam, torch.optim.Adam or AdamW.

        raises: ValueError, before anything is changed, where it does not fit these parameters
        """
        _check_state_dict(self.param_groups, state_dict)
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("decoupled_weight_decay", False)
        if "_written" not in self.__dict__:  # a copy: it steps the same, without a model to serve
            self._sparsity, self._value_dtype, self._written = None, None, {}


@dataclass
class _Written:
    """An earlier result, whose memory serves again as long as the weights are the same."""

    weights: list[Tensor]
    out: ThresholdStats

    def fits(self, weights: list[Tensor]) -> bool:
        return len(weights) == len(self.weights) and all(
            a is b and a.stride() == v.stride() and a.shape == v.shape
            for a, b, v in zip(weights, self.weights, self.out.values, strict=True)
        )


def _rule(group: Mapping[str, Any], step: int) -> AdamRule:
    first, second = group["betas"]
    try:
        return AdamRule(
            lr=float(group["lr"]),
            betas=(float(first), float(second)),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=bool(group["decoupled_weight_decay"]),
            step=step,
        )
    except ValueError as error:
        raise ValueError(str(error).replace("AdamRule", _WHO)) from None


def _by_kind(stepped: list[_Stepped]) -> list[list[_Stepped]]:
    """Parameters of one device and type go together, in their order."""
    kinds: dict[tuple[torch.device, torch.dtype], list[_Stepped]] = {}
    for one in stepped:
        kinds.setdefault((one.weight.device, one.weight.dtype), []).append(one)
    return list(kinds.values())


def _columns(
    alike: list[_Stepped],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[AdamRule]]:
    """What threshold_adam takes first: weights, gradients, moments and rules."""
    return (
        [s.weight for s in alike],
        [s.grad for s in alike],
        [s.mean for s in alike],
        [s.square for s in alike],
        [s.rule for s in alike],
    )


def _check_state_dict(groups: list[dict[str, Any]], given: Mapping[str, Any]) -> None:
    if not {"state", "param_groups"} <= set(given):
        raise ValueError(
            f"{_WHO}: Expected a state dict with state and param_groups, got {sorted(given)}"
        )
    sizes = [len(group["params"]) for group in groups]
    found = [len(group["params"]) for group in given["param_groups"]]
    if sizes != found:
        raise ValueError(f"{_WHO}: Expected groups of {sizes} parameters, got {found}")
    for group in given["param_groups"]:
        for name in ("amsgrad", "maximize"):
            if group.get(name):
                raise ValueError(f"{_WHO}: Expected a state dict without {name}, got one with it")
        _rule({"decoupled_weight_decay": False, **group}, 1)
    names = [name for group in given["param_groups"] for name in group["params"]]
    params = dict(zip(names, (p for group in groups for p in group["params"]), strict=True))
    for name, state in given["state"].items():
        if name not in params or set(state) != {"step", *_MOMENTS}:
            raise ValueError(
                f"{_WHO}: Expected step, exp_avg and exp_avg_sq of a known parameter, "
                f"got {sorted(state)} of parameter {name}"
            )
        for key in _MOMENTS:
            if state[key].shape != params[name].shape:
                raise ValueError(
                    f"{_WHO}: Expected {key} of parameter {name} of shape "
                    f"{list(params[name].shape)}, got {list(state[key].shape)}"
                )
