"""A user's own network with what no op of ours computes: torch runs that, and it is named."""

import torch
import torch.nn.functional as F
from torch import nn

import sparsemtl


class ChannelNorm(nn.Module):
    """Layer norm over the channels of a map, as ConvNeXt has it."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), ChannelNorm(16))
        self.mix = nn.Conv2d(16, 16, 7, padding=3, groups=16)
        self.block = nn.Sequential(
            ChannelNorm(16), nn.Conv2d(16, 64, 1), nn.GELU(), nn.Conv2d(64, 16, 1)
        )
        self.norm = nn.GroupNorm(4, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(16, 4, 2, 2)
        self.segmentation = nn.Conv2d(16, 5, 3, padding=2, dilation=2)

    def forward(self, x):
        y = self.stem(x)
        y = F.hardswish(self.norm(y + self.block(self.mix(y))))
        tokens = y.flatten(2).transpose(1, 2)
        seen, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        y = y + seen.transpose(1, 2).reshape(y.shape)
        size = x.shape[-2:]
        return {
            "segmentation": F.interpolate(self.segmentation(y), size, mode="bicubic"),
            "depth": F.softplus(F.pixel_shuffle(self.up(y), 2)),
        }


def pruned() -> TwoHeads:
    torch.manual_seed(0)
    net = TwoHeads().eval()
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.2)
    return net


def test_two_heads_with_norms_and_attention(tmp_path):
    net = pruned()
    engine = sparsemtl.compile(net, torch.zeros(2, 3, 32, 48))
    engine.save(tmp_path / "engine")
    loaded = sparsemtl.Engine.load(tmp_path / "engine")
    for shape in ((2, 3, 32, 48), (3, 3, 48, 32)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            wanted = net(x)
        for run in (engine, loaded):
            found = run(x)
            assert found.keys() == wanted.keys()
            for task, y in wanted.items():
                torch.testing.assert_close(found[task], y, rtol=1e-4, atol=1e-5)
    through = next(
        line for line in str(engine.explain()).splitlines() if line.startswith("through torch")
    )
    for op in ("layer_norm", "group_norm", "gelu", "scaled_dot_product", "bicubic", "shuffle"):
        assert op in through
