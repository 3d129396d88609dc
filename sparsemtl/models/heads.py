"""Task heads: atrous spatial pyramid pooling as AdaShare, DiSparse and AdapMTL code it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sparsemtl.models.dropout import Dropout

RATES = (6, 12, 18, 24)
HIDDEN = 1024


class ASPPHead(nn.Module):
    """The sum of parallel branches, one per dilation rate; no batch norm.

    A branch is conv 3x3 (dilated) → ReLU → dropout → conv 1x1 → ReLU → dropout → conv 1x1,
    all with bias and torch's own initialisation.

    in_channels:  channels of the backbone's output
    out_channels: channels of the prediction (classes for segmentation, 3 for normals, else 1)
    hidden:       channels inside a branch
    dropout:      probability in [0, 1)
    input: [B, in_channels, h, w]    output: [B, out_channels, h, w]
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden: int = HIDDEN,
        rates: Sequence[int] = RATES,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            _branch(in_channels, out_channels, hidden, rate, dropout) for rate in rates
        )

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.branches
        out: Tensor = first(x)
        for branch in rest:
            out = out + branch(x)
        return out


def _branch(
    in_channels: int, out_channels: int, hidden: int, rate: int, dropout: float
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, hidden, 3, padding=rate, dilation=rate),
        nn.ReLU(),
        Dropout(dropout),
        nn.Conv2d(hidden, hidden, 1),
        nn.ReLU(),
        Dropout(dropout),
        nn.Conv2d(hidden, out_channels, 1),
    )
