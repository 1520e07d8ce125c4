"""Networks of which fp16 or INT8 breaks one known layer; tests copy this file beside the YAML that names them."""

from __future__ import annotations

import torch
from torch import nn


class WideNorm(nn.Module):
    """A LayerNorm in parts, as many transformers write it: the square of what it centres is the mischief."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        square = centred * centred  # overflows in fp16
        variance = square.mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class LayerNormNet(nn.Module):
    """Activations of some hundreds go into a norm, as in deep residual streams."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.norm = WideNorm(32)
        self.second = nn.Linear(32, 32)
        self.quiet = WideNorm(32)
        self.last = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.relu(self.first(x)) * 400.0)
        return self.last(self.quiet(torch.relu(self.second(x))))


class L2Net(nn.Module):
    """Embeddings brought to length one by hand, without a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 64)
        self.last = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x) * 100.0
        length = (y * y).sum(-1, keepdim=True).sqrt()  # overflows in fp16
        return self.last(y / length)


class TwoOverflows(L2Net):
    """Every batch overflows in the length; behind it the greatest one does so once more, in a sum over the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x) * 100.0
        short = y / y.pow(2).sum(-1, keepdim=True).sqrt()
        total = (short.abs() * 1700.0).sum()  # about 11,000 a row
        return self.last(short) + total / 60000.0


class Difference(nn.Module):
    """A small signal on a large offset, which is then taken away: fp16 keeps the offset and loses the signal."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.last = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x) + 1000.0
        y = torch.relu(y)
        return self.last(y - 1000.0)  # cancels


def layer_norm() -> nn.Module:
    torch.manual_seed(0)
    return LayerNormNet()


def l2_norm() -> nn.Module:
    torch.manual_seed(0)
    return L2Net()


def two_overflows() -> nn.Module:
    torch.manual_seed(0)
    return TwoOverflows()


def difference() -> nn.Module:
    torch.manual_seed(0)
    return Difference()


def outlier() -> nn.Module:
    """One convolution's input has a channel a thousand times the others: INT8 has no steps left for those."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("one", nn.Conv2d(3, 16, 3, padding=1))
    net.add_module("relu1", nn.ReLU())
    net.add_module("two", nn.Conv2d(16, 16, 3, padding=1))
    net.add_module("relu2", nn.ReLU())
    net.add_module("three", nn.Conv2d(16, 16, 3, padding=1))
    net.add_module("pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("flat", nn.Flatten())
    net.add_module("head", nn.Linear(16, 5))
    with torch.no_grad():
        one, two = net.one, net.two
        assert isinstance(one, nn.Conv2d)
        assert isinstance(two, nn.Conv2d)
        assert one.bias is not None
        one.weight[0] *= 2000
        one.bias[0] = one.bias[0].abs() + 1000
        two.weight[:, 0] /= 2000
    return net
