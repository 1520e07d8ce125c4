"""Bisection on engines of the pieces, built and run on this GPU, with the same networks as on onnxruntime."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import trtforge
from trtforge.converter.bisect import bisect_on
from trtforge.converter.progress import Stages
from trtforge.runtime.device import gpu_present

sys.path.insert(0, str(Path(__file__).parents[1] / "cases"))

import blame_models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_present(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize(
    ("factory", "line", "kinds"),
    [
        ("layer_norm", "square = centred * centred", {"overflow"}),
        ("l2_norm", "(y * y).sum", {"overflow"}),
        ("difference", "y - 1000.0", {"cancellation"}),
    ],
)
def test_the_engine_is_bisected_and_mended(tmp_path: Path, factory: str, line: str, kinds: set[str]) -> None:
    settings = {"dims": {"batch": (1, 4, 8)}, "inputs": {"x": ("batch", 16)}, "overflow_guard": False}
    net, example = getattr(blame_models, factory)(), torch.randn(4, 16)
    with pytest.raises(trtforge.ParityError):
        trtforge.convert(net, example, tmp_path / "net", precision="fp16", **settings)
    found = bisect_on(tmp_path / "net.failed", "engine", Stages(lambda event: None))
    assert found.runner.startswith("tensorrt")
    assert found.outcome == "mended", found.to_json()
    blame = found.blames[0]
    number = int(blame.line.rpartition(":")[2])
    source = Path(blame_models.__file__).read_text(encoding="utf-8").splitlines()[number - 1]
    assert line in source, found.to_json()
    assert blame.symptom.kind in kinds
    assert found.plan is not None
    artifact = trtforge.convert(net, example, tmp_path / "net", precision=found.plan, **settings)
    assert artifact.status == "validated"


def test_auto_takes_the_engine_where_there_is_one(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    settings = {"dims": {"batch": (1, 4, 8)}, "inputs": {"input": ("batch", 16)}}
    trtforge.convert(net, torch.randn(4, 16), tmp_path / "net", precision="fp16", **settings)
    found = bisect_on(tmp_path / "net", "auto", Stages(lambda event: None))
    assert found.outcome == "agrees"
    assert found.runner.startswith("tensorrt")
    assert found.blames  # fp16 rounds somewhere
