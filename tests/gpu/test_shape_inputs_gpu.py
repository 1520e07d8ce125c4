"""Engines whose input's values decide shapes, run: proved at every size, and called with one after another."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
import pytest

from trtforge.converter.config import read_config
from trtforge.converter.pipeline import convert_config
from trtforge.converter.progress import Stages, ignore_events
from trtforge.runtime.device import gpu_present
from trtforge.runtime.errors import ConfigError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu_present(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),
]

TEXT = """<ir_version: 10, opset_import: ["": 20]>
g (float[n,2,8,8] x, int64[2] size) => (float[n,2,h,w] y) {
  s = Shape<start = 0, end = 2>(x) sizes = Concat<axis = 0>(s, size) y = Resize<mode = "linear">(x, , , sizes)
}"""
YAML = """version: 1
models:
  resize:
    source: {onnx: model.onnx}
    dims:
      - {n: [1, 1, 2], height: [4, 8, 8], width: [4, 8, 8]}
      - {n: [1, 4, 8], height: [8, 16, 32], width: [8, 16, 32]}
    inputs:
      x: {shape: [n, 2, 8, 8]}
      size: {dtype: int64, shape: [2], values: [height, width]}
"""


def test_an_engine_resizes_to_what_a_tensor_says(tmp_path: Path) -> None:
    import torch

    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "model.onnx")
    (tmp_path / "models.yaml").write_text(YAML)
    (config,) = read_config(tmp_path / "models.yaml")
    artifact = convert_config(config, tmp_path / "out", Stages(ignore_events))
    assert artifact.status == "validated"
    x = torch.randn(2, 2, 8, 8, device="cuda")
    with artifact.load() as engine:
        assert engine.profiles[0]["size"] == ((4, 4), (8, 8), (8, 8))
        assert engine.profiles[1]["size"] == ((8, 8), (16, 16), (32, 32))
        for _ in range(3):  # the third time from CUDA graphs
            for size in ((4, 6), (8, 8), (32, 20), (16, 16)):
                got = engine(x, torch.tensor(size))
                expected = torch.nn.functional.interpolate(x, size=size, mode="bilinear")
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(ConfigError, match="no profile of the engine holds"):
            engine(x, torch.tensor([4, 32]))
        assert engine.graphs > 0
