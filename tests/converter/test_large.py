"""Weights past 2 GiB, which protobuf refuses in one file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trtforge
from trtforge.runtime.errors import ArtifactError


class Table(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(1_150_000, 512)  # 2.36 GB
        self.head = torch.nn.Linear(512, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids))


@pytest.mark.slow
def test_external_data_past_2_gib(tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact = trtforge.convert(
        Table(),
        torch.randint(0, 1_150_000, (2, 8)),
        tmp_path / "table",
        dims={"batch": (1, 2, 4)},
        inputs={"ids": ("batch", 8)},
    )
    assert artifact.status in ("built", "validated")
    data = artifact.path / "reference.onnx.data"
    assert data.stat().st_size > 2**31
    with data.open("r+b") as file:
        file.seek(2**31 + 12345)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ArtifactError, match=r"reference\.onnx\.data was altered"):
        trtforge.open_artifact(artifact.path)
