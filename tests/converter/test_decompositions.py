"""Operators of torch without an ONNX form that engines take: exported, equal to torch at several sizes, and built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import trtforge

pytest.importorskip("tensorrt_rtx", reason="builds without a GPU")


class Call(torch.nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> object:
        return self.function(x)


def masked(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[x > 0] = 1.5
    y[:, :2][x[:, :2] < -1] = 0
    y[x.sum(-1) > 1] = torch.arange(12.0)
    return y


CASES: dict[str, Callable[[torch.Tensor], object]] = {
    "median": lambda x: (x.median(dim=1).values, x.median(-1, keepdim=True).values),
    "cdist": lambda x: (torch.cdist(x, 2 * x[:, :5] + 1), torch.cdist(x, 2 * x[:, :5], p=1.0)),
    "mask": masked,
    "fft": lambda x: torch.fft.irfft2(2 * torch.fft.rfft2(x), s=(8, 12)),
    "fold": lambda x: torch.nn.functional.fold(
        torch.nn.functional.unfold(x[:, None], 3, padding=1), (8, 12), 3, padding=1
    ),
    "scatter_add": lambda x: torch.zeros(x.shape[0], 5, 12).scatter_add(1, (x.abs() * 3).long() % 5, x),
    "index_add": lambda x: torch.zeros(x.shape[0], 3, 12).index_add(1, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), x),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_proved_and_built(name: str, tmp_path: Path) -> None:
    artifact = trtforge.convert(
        Call(CASES[name]), torch.randn(2, 8, 12), tmp_path / name, dims={"b": (1, 3, 5)}, inputs={"x": ("b", 8, 12)}
    )
    assert artifact.engine is not None
    assert float(artifact.facts["measured"]["sqnr_db"]) > 100  # text where it is infinite
