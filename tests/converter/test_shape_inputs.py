"""Inputs whose values decide shapes: `values` names the dimension that each of them is."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
import pytest
import torch

import trtforge
from trtforge.converter.config import read_config
from trtforge.converter.pipeline import convert_config
from trtforge.converter.profiles import engine_profiles, engine_values
from trtforge.converter.progress import Stages, ignore_events
from trtforge.runtime.errors import BuildError, ConfigError
from trtforge.validation.golden import GoldenSet

TEXT = """<ir_version: 10, opset_import: ["": 20]>
g (float[n,2,8,8] x, int64[2] size) => (float[n,2,h,w] y) {
  s = Shape<start = 0, end = 2>(x) sizes = Concat<axis = 0>(s, size) y = Resize<mode = "linear">(x, , , sizes)
}"""
YAML = """version: 1
models:
  resize:
    source: {source}
    dims: {dims}
    inputs:
      x: {{shape: [n, 2, 8, 8]}}
      size: {size}
    target: {{backend: tensorrt-rtx}}
"""
DIMS = "{n: [1, 2, 4], height: [4, 16, 32], width: [4, 8, 64]}"
TWO = "[{n: [1, 1, 2], height: [4, 8, 8], width: [4, 8, 8]}, {n: [1, 4, 8], height: [8, 16, 32], width: [8, 16, 32]}]"
SIZE = "{dtype: int64, shape: [2], values: [height, width]}"


class Resize(torch.nn.Module):
    """Resizes what a convolution gives to the size that a tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        height, width = size[0].item(), size[1].item()  # not int(…): torch.export would need the value
        for side in (height, width):
            torch._check(side >= 4)
            torch._check(side <= 64)
        return torch.nn.functional.interpolate(self.conv(x), size=(height, width), mode="nearest")


def _config(folder: Path, *, source: str = "{onnx: model.onnx}", dims: str = DIMS, size: str = SIZE):
    onnx.save(onnx.parser.parse_model(TEXT), folder / "model.onnx")
    file = folder / "models.yaml"
    file.write_text(YAML.format(source=source, dims=dims, size=size))
    return read_config(file)[0]


def _convert(folder: Path, **changed: str) -> trtforge.Artifact:
    pytest.importorskip("tensorrt_rtx")
    return convert_config(_config(folder, **changed), folder / "out", Stages(ignore_events))


@pytest.mark.parametrize("dims", [DIMS, TWO], ids=["one profile", "two"])
def test_an_engine_is_built_and_proved_at_every_size(tmp_path: Path, dims: str) -> None:
    artifact = _convert(tmp_path, dims=dims)
    assert artifact.status in ("built", "validated")
    golden = GoldenSet.load(artifact.path / "proof")
    seen = set()
    for sample in golden.samples:
        size = sample.inputs["size"].tolist()
        assert size == [sample.sizes["height"], sample.sizes["width"]]
        assert sample.outputs["y"].shape[2:] == tuple(size)
        seen.add(tuple(size))
    wanted = {
        tuple(getattr(p[d], end) for d in ("height", "width"))
        for p in artifact.profiles
        for end in ("min", "opt", "max")
    }
    assert seen == wanted
    # From the folder alone the same profiles are made again.
    config = _config(tmp_path, dims=dims)
    assert engine_values(artifact.inputs, artifact.profiles) == engine_values(config.inputs, config.profiles)
    assert (
        engine_profiles(artifact.inputs, artifact.profiles)[0]["x"]
        == engine_profiles(config.inputs, config.profiles)[0]["x"]
    )


def test_a_module_whose_tensor_decides_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    artifact = _convert(tmp_path, source="{factory: 'test_shape_inputs:Resize'}")
    assert artifact.status in ("built", "validated")
    shapes = {sample.outputs["output"].shape for sample in GoldenSet.load(artifact.path / "proof").samples}
    assert shapes == {(1, 3, 4, 4), (2, 3, 16, 8), (4, 3, 32, 64)}


def test_values_without_ranges_are_refused_with_the_line_to_write(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="the values of input 'size' decide shapes") as caught:
        _convert(tmp_path, dims="{n: [1, 2, 4]}", size="{dtype: int64, shape: [2], values: [4, 8]}")
    assert "values: [height, width]" in caught.value.fix


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("{dtype: float32, shape: [2], values: [height, width]}", r"int32 or int64 of shape \[\] or \[N\]"),
        ("{dtype: int64, shape: [n], values: [height, width]}", r"int32 or int64 of shape \[\] or \[N\]"),
        ("{dtype: int64, shape: [3], values: [height, width]}", "2 values for 3 elements"),
        ("{dtype: int64, shape: [2], values: [height, breadth]}", "dimension 'breadth'"),
    ],
)
def test_values_that_cannot_decide(tmp_path: Path, size: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _config(tmp_path, size=size)
