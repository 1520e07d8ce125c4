"""Networks that overflow in fp16, always or on rare inputs; tests copy this file beside the YAML that names them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

RARE = 0.03


class WideLayerNorm(nn.Module):
    """A residual stream of some hundreds goes into a LayerNorm written in parts; its squares leave fp16's range."""

    def __init__(self, scale: float, width: int) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Linear(16, width)
        self.middle = nn.Linear(width, width)
        self.last = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stream = torch.relu(self.first(x) * self.scale)
        centred = stream - stream.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        normed = centred / torch.sqrt(variance + 1e-5)
        return self.last(torch.relu(self.middle(normed)))


class WideL2(nn.Module):
    """Embeddings brought to length one."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.embed = nn.Linear(16, 64)
        self.middle = nn.Linear(64, 32)
        self.last = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.embed(x) * self.scale
        short = wide / (wide * wide).sum(-1, keepdim=True).sqrt()
        return self.last(torch.relu(self.middle(8 * short)))


def layer_norm(scale: float = 500.0, width: int = 48) -> nn.Module:
    torch.manual_seed(0)
    return WideLayerNorm(scale, width)


def l2_norm(scale: float = 100.0) -> nn.Module:
    torch.manual_seed(0)
    return WideL2(scale)


def inputs(count: int = 600, batch: int = 8, rare: float = 0.0, seed: int = 3) -> Iterator[np.ndarray]:
    """Noise; a share of the samples is forty times as large, as a sensor's glare is."""
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(count, 16)).astype(np.float32)
    data[rng.random(count) < rare] *= 40
    for start in range(0, count, batch):
        yield data[start : start + batch]
