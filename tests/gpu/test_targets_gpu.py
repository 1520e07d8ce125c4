"""What the target's options do to an engine that runs: streamed weights within a budget."""

from __future__ import annotations

from pathlib import Path

import pytest

import trtforge
from trtforge.runtime.device import gpu_present
from trtforge.runtime.errors import ConfigError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_present(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def model() -> object:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8))).eval()  # 32 MiB of weights


@pytest.mark.parametrize("budget", [None, 16, 0])
def test_streamed_weights_give_the_same_answers(model: object, budget: int | None, tmp_path: Path) -> None:
    import torch

    artifact = trtforge.convert(model, torch.randn(4, 1024), tmp_path / "mlp", target={"weight_streaming": True})
    assert artifact.status == "validated"
    x = torch.randn(4, 1024, device="cuda")
    with artifact.load(weight_budget_mib=budget) as engine:
        got = engine(x).cpu()
    expected = model(x.cpu())
    assert float((got - expected).abs().max() / expected.std()) < 1e-3


def test_a_budget_for_weights_that_do_not_stream(model: object, tmp_path: Path) -> None:
    import torch

    artifact = trtforge.convert(model, torch.randn(4, 1024), tmp_path / "mlp")
    with pytest.raises(ConfigError, match="no weights to stream"):
        artifact.load(weight_budget_mib=1)
