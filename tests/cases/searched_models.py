"""A network of which INT8 breaks some layers, and data for it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


class Net(nn.Module):
    """Norms with a few wide channels: they are smoothed, and the products behind them lose most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)
        self.c, self.d = nn.Linear(32, 64), nn.Linear(64, 40)
        with torch.no_grad():
            self.norm1.weight[:3] *= 60
            self.norm2.weight[:2] *= 40

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(nn.functional.gelu(self.a(self.norm1(x))))
        return self.d(nn.functional.gelu(self.c(self.norm2(x + y))))


def net() -> nn.Module:
    return Net()


def rows(seed: int, count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield rng.standard_normal((8, 32)).astype(np.float32)
