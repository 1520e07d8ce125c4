"""The pytest plugin where there is a GPU: a user's repository, whose test runs the engine itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from trtforge.runtime.device import gpu_present

sys.path.insert(0, str(Path(__file__).parents[1] / "cases"))

from plugin_repository import MODEL, make_repository, with_outlier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_present(), reason="needs a GPU"),
]

TEST = """\
import numpy as np
import pytest
import torch
from my_models import net


@pytest.mark.engine("configs/net.yaml", model="net")
def test_net(engine_case):
    assert engine_case.artifact.status == "validated"
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    got = engine_case.run({"x": x})["y"]
    np.testing.assert_allclose(got, net()(torch.from_numpy(x)).detach().numpy(), atol=5e-3)
"""


def test_the_engine_is_the_one_under_test(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, gpu=True)
    repository.write("test_engines.py", TEST)
    made = repository.pytest("--engine-baseline=update", code=0)
    assert "1 entry of engine-baseline.json changed" in made
    entry = repository.baseline["engines"]["configs/net.yaml::net"]
    assert list(entry["proof"]) == ["export", "precision", "engine"]
    assert "2 passed" in repository.pytest(code=0)
    repository.write("my_models.py", with_outlier(MODEL.replace("SEED", "0")))
    worse = repository.pytest("-k", "test_net", code=1)
    assert "regression against engine-baseline.json" in worse
    assert "likely cause: weights changed" in worse
    rows = [line for line in worse.splitlines() if "<-- worse" in line]
    assert any("engine" in row for row in rows), worse
