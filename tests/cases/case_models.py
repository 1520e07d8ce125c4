"""Small models that go right or wrong in one known way; tests copy this file beside the YAML that names them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


def healthy() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


class Zero(nn.Module):
    """Its head is zero, as fresh ViT and EfficientNet heads are: equality with it proves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class Branch(nn.Module):
    """A Python `if` on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return x - 1


class Frozen(nn.Module):
    """Chunks the batch into two, as RAFT does: exporters freeze it in silence."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = torch.split(x, [4, 4])
        return first * second


class Unsupported(nn.Module):
    """`torch.unique` becomes ONNX Unique, which TensorRT's parser lacks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values, inverse = torch.unique(x, return_inverse=True)
        return inverse.to(x.dtype) + values.sum()


class Raises(nn.Module):
    """The user's own bug."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("the user's own key")


class Overflows(nn.Module):
    """Half precision overflows inside: squares of numbers around 300."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        big = x * 300
        return big / (big * big).sum(-1, keepdim=True).sqrt()


def raising_factory() -> nn.Module:
    raise ValueError("the factory's own error")


def not_a_module() -> int:
    return 3


def labelled(count: int = 400, batch: int = 8, classes: int = 5) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images for `healthy`, with the answers that it gives itself."""
    model = healthy().eval()
    images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        answers = model(images).argmax(1) % classes
    for start in range(0, count, batch):
        yield images[start : start + batch], answers[start : start + batch]


def mean_answer(predictions: np.ndarray, labels: np.ndarray) -> float:
    """A metric of everything at once."""
    return float((predictions.argmax(1) == labels).mean())


def one_answer_each(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A metric with a number a sample."""
    return predictions.argmax(1) == labels


def broken_metric(predictions: np.ndarray, labels: np.ndarray) -> float:
    raise ZeroDivisionError("the user's own division")
