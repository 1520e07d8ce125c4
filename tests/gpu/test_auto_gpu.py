"""`precision: auto` on the engine itself: latencies are measured on this GPU, and only what is faster is chosen."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trtforge
from trtforge.converter.bisect import bisect_on
from trtforge.converter.progress import Stages
from trtforge.runtime.device import gpu_present

sys.path.insert(0, str(Path(__file__).parents[1] / "cases"))

import overflow_models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_present(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]

FLOATS = ("fp32", "bf16", "fp16")
QUANTIZED = ("fp8", "int8")


class Encoder(nn.Module):
    """Two layers of a transformer over 64 tokens: matrix products, which every release quantizes."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).mean(1))


def small_conv() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def batches(*shape: int, count: int = 12, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((8, *shape)).astype(np.float32) for _ in range(count)]


def keep(name: str, artifact: trtforge.Artifact) -> None:
    """The Pareto table beside the other results of this machine, where a place for those is named."""
    if place := os.environ.get("TRTFORGE_RESULTS"):
        with Path(place).open("a") as file:
            file.write(json.dumps({"auto": name, "search": artifact.facts["search"]}) + "\n")


@pytest.mark.parametrize(("name", "shape"), [("encoder", (64, 256)), ("conv", (3, 32, 32))])
def test_what_is_chosen_passes_and_is_the_fastest(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = Encoder() if name == "encoder" else small_conv()
    parameter = "x" if name == "encoder" else "input"
    artifact = trtforge.convert(
        net, torch.from_numpy(batches(*shape, count=1)[0]), tmp_path / "net", precision="auto",
        dims={"batch": (1, 8, 8)}, inputs={parameter: ("batch", *shape)},
        calibration=batches(*shape), accuracy={"metric": "cosine", "labels": "model", "max_drop": 0.01,
                                               "data": batches(*shape, count=40, seed=1)},
    )  # fmt: skip
    keep(name, artifact)
    assert artifact.status == "validated"
    search = artifact.facts["search"]
    table: dict[str, Any] = {row["name"]: row for row in search["candidates"]}
    assert search["timed"]
    assert list(table) == [*FLOATS, *QUANTIZED]
    assert all(table[kind]["latency_ms"] > 0 for kind in FLOATS)
    passed = {kind: row["latency_ms"] for kind, row in table.items() if row["passed"]}
    chosen = search["chosen"]
    assert passed[chosen] <= 1.02 * min(passed.values())
    for kind in QUANTIZED:
        row = table[kind]
        if row["latency_ms"] is None:  # INT8 convolutions, on releases before 1.7
            assert not row["passed"]
        elif row["latency_ms"] > table["fp16"]["latency_ms"] and table["fp16"]["passed"]:
            assert chosen != kind
    assert [row for row in search["candidates"] if row["pareto"]]
    page = (artifact.path / "report.html").read_text()
    assert " ms" in page
    layers = json.loads((artifact.path / "report.json").read_text())["engine_layers"]
    assert layers
    assert "engine" in page.lower()


def labelled(rare: float) -> Iterator[np.ndarray]:
    return overflow_models.inputs(rare=rare)


@pytest.mark.parametrize(
    ("factory", "wide", "narrow", "line"),
    [("layer_norm", 500.0, 10.0, "centred * centred"), ("l2_norm", 100.0, 2.0, "(wide * wide).sum")],
)
@pytest.mark.parametrize("rare", [False, True])
def test_what_overflows_alone_stays_in_fp32(
    tmp_path: Path, factory: str, wide: float, narrow: float, line: str, rare: bool
) -> None:
    net = getattr(overflow_models, factory)(scale=narrow if rare else wide)
    settings: dict[str, Any] = {
        "dims": {"batch": (1, 8, 8)},
        "inputs": {"x": ("batch", 16)},
        "overflow_guard": False,
        "accuracy": {
            "metric": "top1",
            "labels": "model",
            "max_drop": 0.02,
            "data": list(overflow_models.inputs(rare=0.1 if rare else 0.0)),
        },
    }
    example = torch.randn(8, 16)
    with pytest.raises(trtforge.ParityError) as caught:
        trtforge.convert(net, example, tmp_path / "net", precision="fp16", **settings)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "net").exists()
    failed = trtforge.open_artifact(tmp_path / "net.failed")
    golden = json.loads((failed.path / "report.json").read_text())["reports"][-1]
    assert golden["candidate"]["stage"] == "engine"
    assert golden["verdict"] == ("passed" if rare else "failed")
    found = bisect_on(failed.path, "engine", Stages(lambda event: None))
    assert found.runner.startswith("tensorrt")
    assert found.outcome == "mended", found.to_json()
    blame = found.blames[0]
    number = int(blame.line.rpartition(":")[2])
    assert line in Path(overflow_models.__file__).read_text(encoding="utf-8").splitlines()[number - 1]
    assert blame.symptom.kind == "overflow"
    assert blame.rules
    artifact = trtforge.convert(net, example, tmp_path / "net", precision="auto", **settings)
    keep(f"{factory}{' on rare inputs' if rare else ''}", artifact)
    assert artifact.status == "validated"
    table = {row["name"]: row for row in artifact.facts["search"]["candidates"]}
    assert set(table) == set(FLOATS)
    assert table["fp16"]["unmended"] is not None
    assert table["fp16"]["passed"]
    assert 1 <= len(table["fp16"]["kept_back"]) <= 8
    assert not [name for name in table["fp16"]["kept_back"] if "Gemm" in name or "MatMul" in name]
