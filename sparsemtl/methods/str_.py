"""STR: one learnable soft threshold per layer, on convolutions and linear layers.

Source: Kusupati et al., Soft Threshold Weight Reparameterization, ICML 2020. Its budget comes from
a hand-tuned weight decay and initial value, which do not transfer between optimizers and schedules;
here the controller of AdapMTL meets it, and each layer's threshold learns by its own gradient
through the main optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsemtl.methods.adapmtl import AdapMTL, AdapMTLConfig
from sparsemtl.sparsity.controller import ControllerConfig


@dataclass(frozen=True)
class STRConfig:
    """As AdapMTL's, with one threshold per layer."""

    sparsity: float = 0.9  # fraction of zeros over all components, met exactly
    theta_init: float = -20.0  # θ before training
    split: str = "adam"  # by each θ's own gradient; joint: as AdapMTL here
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    def __post_init__(self) -> None:
        self.layerwise()  # its checks are these fields'

    def layerwise(self) -> AdapMTLConfig:
        """The same choices, spelled for the thresholds' own machinery."""
        return AdapMTLConfig(
            sparsity=self.sparsity,
            grouping="layer",
            theta_init=self.theta_init,
            split=self.split,
            controller=self.controller,
        )


class STR(AdapMTL):
    """Learned thresholds per layer, exact target, then a fixed mask."""

    name = "str"
    default_weighting = "fixed"

    def __init__(self, config: STRConfig, components: Mapping[str, Any] | None = None) -> None:
        super().__init__(config.layerwise(), components)
