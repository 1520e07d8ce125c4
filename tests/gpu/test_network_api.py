"""Networks defined by TensorRT's own API, proved against PyTorch by running."""

from __future__ import annotations

from pathlib import Path

import network_models
import pytest

import trtforge
from trtforge.converter.progress import Stages, ignore_events
from trtforge.converter.rebuild import build_artifact
from trtforge.converter.revalidate import validate_artifact
from trtforge.runtime.device import gpu_present
from trtforge.runtime.errors import ArtifactError, ParityError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_present(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]


def _convert(folder: Path, **kwargs: object) -> trtforge.Artifact:
    import torch

    network_models.save_weights(folder / "weights.npz")
    return trtforge.convert(
        network_models.make_module(),
        torch.randn(2, 3, 8, 8),
        folder / "net",
        dims={"batch": (1, 2, 4)},
        inputs={"input": ("batch", 3, 8, 8)},
        network=network_models.define,
        network_kwargs={"weights": str(folder / "weights.npz"), **kwargs},
    )


def test_a_network_that_equals_the_module_is_validated_and_runs(tmp_path: Path) -> None:
    import torch

    artifact = _convert(tmp_path)
    assert artifact.status == "validated"
    assert artifact.facts["measured"]["stage"] == "engine"
    assert artifact.facts["source"]["network"] == "network_models:define"
    with artifact.load() as engine:
        x = torch.randn(3, 3, 8, 8)
        torch.testing.assert_close(engine(x.cuda()).cpu(), network_models.make_module()(x), atol=1e-4, rtol=1e-4)
    assert validate_artifact(artifact.path, stages=Stages(ignore_events)).status == "validated"
    with pytest.raises(ArtifactError, match="network of network_models:define"):
        build_artifact(artifact.path, stages=Stages(ignore_events))


def test_one_that_does_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParityError):
        _convert(tmp_path, scale=1.25)
    assert not (tmp_path / "net").exists()
    assert trtforge.open_artifact(tmp_path / "net.failed").status == "failed"
