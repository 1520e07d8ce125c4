"""The audit on an artifact: its proof refuses what matters, passes what does not, and a blunt proof is found out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import trtforge
from trtforge.converter.artifact import Artifact
from trtforge.converter.audit import Ask, audit_artifact
from trtforge.converter.audit_command import audit
from trtforge.converter.faults import FAULTS
from trtforge.converter.progress import Stages
from trtforge.converter.rewrites import REWRITES
from trtforge.runtime.errors import ConfigError

pytestmark = pytest.mark.slow  # a minute each on two busy cores


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.features(x) + 0.1).mean((2, 3)))


def convert(folder: Path, **options: object) -> Artifact:
    torch.manual_seed(0)
    return trtforge.convert(
        Net(),
        torch.randn(4, 2, 6, 6),
        folder / "net",
        dims={"batch": (1, 4, 16)},
        inputs={"x": ("batch", 2, 6, 6)},
        **options,
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return convert(tmp_path_factory.mktemp("audit"), precision="fp16")


@pytest.fixture(scope="module")
def report(artifact: Artifact):
    return audit_artifact(artifact.path, Ask(faults=52, rewrites=28), Stages())


def test_faults_are_refused_and_rewrites_pass(report) -> None:
    assert report.refused_wrongly == ()
    # Rare inputs are met by luck in a set of so few rows.
    assert {trial.kind for trial in report.let_through} <= {"rare overflow", "rare saturation"}
    assert len(report.faults) == 52
    assert len(report.rewrites) == 28
    assert {trial.stage for trial in report.trials} == {"export", "precision"}
    assert {trial.kind for trial in report.rewrites} == set(REWRITES)
    assert len({trial.kind for trial in report.faults}) >= len(FAULTS) - 2


def test_faults_differ_from_one_another(report) -> None:
    for stage in ("export", "precision"):
        made = [(trial.kind, trial.what) for trial in report.trials if trial.fault and trial.stage == stage]
        assert len(set(made)) == len(made)


def test_nothing_of_the_artifact_changed(artifact: Artifact, report) -> None:
    trtforge.open_artifact(artifact.path)
    assert [path.name for path in artifact.path.parent.iterdir()] == ["net"]


def test_same_seed_gives_the_same_faults(artifact: Artifact, report) -> None:
    again = audit_artifact(artifact.path, Ask(faults=10, rewrites=2), Stages())
    first = [trial for trial in report.faults if trial.stage == "export"][:5]
    assert [t.what for t in again.faults if t.stage == "export"] == [t.what for t in first]


def test_what_the_budget_allows_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the user asks for next to nothing, most faults are none."""
    loose = convert(tmp_path, precision="fp32", tolerance={"sqnr_db": 0.5, "cosine": -1, "max_abs_over_std": 100})
    audit(loose.path, faults=3, rewrites=2, seed=1, loader=None, kwargs=None, as_json=True)
    data = json.loads(capsys.readouterr().out)
    assert data["set_aside"] > data["faults"]
    assert data["rewrites_refused"] == 0
    assert len(data["trials"]) == data["set_aside"] + data["faults"] + data["rewrites"]


def test_wrong_kwargs_are_explained(artifact: Artifact) -> None:
    for kwargs in ("{split: train}", "[1]"):
        with pytest.raises(ConfigError, match="--kwargs"):
            audit(artifact.path, faults=1, rewrites=0, seed=0, loader="m:f", kwargs=kwargs, as_json=True)
