"""What a file says of its inputs, what the caller says, and the whole conversion that follows from both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

import trtforge
from trtforge.converter.foreign import Imported, import_onnx
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.specs import DimRange, is_dim_name

DIMS = {"n": DimRange(1, 2, 4), "t": DimRange(1, 3, 6)}
GRAPH = """<ir_version: 8, opset_import: ["" : 18]>
g (float[a,b,4] x, int64[a] k) => (float[a,b,4] y) <float[5,4] w = {1,2,3,4,5,6,7,8,9,1,1,2,3,4,5,6,7,8,9,2}, int64[1] one = {1}> {
  row = Gather(w, k)
  rows = Unsqueeze(row, one)
  s = Add(x, rows)
  y = Tanh(s)
}"""  # fmt: skip  # noqa: E501


def saved(folder: Path, first: int | str | None, second: int | str | None) -> Path:
    """The graph with these as the open axes of `x` and `y`, and `first` as that of `k`."""
    proto = onnx.parser.parse_model(GRAPH)
    x, k, y = *proto.graph.input, *proto.graph.output
    for value, sizes in ((x, (first, second)), (k, (first,)), (y, (first, second))):
        for dim, size in zip(value.type.tensor_type.shape.dim, sizes, strict=False):
            dim.Clear()
            if isinstance(size, int):
                dim.dim_value = size
            elif size is not None:
                dim.dim_param = size
    onnx.save(proto, folder / "source.onnx")
    return folder / "source.onnx"


def imported(path: Path, **more: Any) -> Imported:
    return import_onnx(path, profiles=[DIMS], opset=None, folder=path.parent, **more)


UNKNOWN = [-1, -7, "?", "", "unk__3", "None", "-1", None]


@pytest.mark.parametrize("size", UNKNOWN)
def test_a_size_that_is_none_is_open(size: int | str | None, tmp_path: Path) -> None:
    path = saved(tmp_path, size, size)
    with pytest.raises(ConfigError, match="axis 0 is dynamic and has no name"):
        imported(path)
    # One name on two axes of different sizes: it says nothing of either.
    found = imported(path, shapes={"x": ("n", "t", 4), "k": ("n",)})
    assert [spec.shape for spec in found.specs] == [("n", "t", 4), ("n",)]
    assert found.model.outputs[0].shape == ("n", "t", 4)
    feeds = {"x": np.ones((2, 3, 4), np.float32), "k": np.array([0, 4])}
    truth, result = (OnnxRuntimeRunner(file).run(feeds)["y"] for file in (path, found.model.path))
    np.testing.assert_array_equal(result, truth)


def test_what_names_a_dimension() -> None:
    assert not any(is_dim_name(str(size)) for size in UNKNOWN)
    assert all(map(is_dim_name, ["N", "batch", "DynamicDimension.0", "2*s77", "unk__", "None_1", "batch size"]))


def test_a_name_that_dims_cannot_have(tmp_path: Path) -> None:
    path = saved(tmp_path, "DynamicDimension.0", "t")
    with pytest.raises(ConfigError, match=r"'DynamicDimension\.0' \(axis 0\) has no range") as caught:
        imported(path)
    assert "names it with letters and digits" in caught.value.fix
    assert imported(path, shapes={"x": ("n", None, 4), "k": ("n",)}).model.inputs[0].shape == ("n", "t", 4)


def test_shapes_and_an_example_from_python(tmp_path: Path) -> None:
    path = saved(tmp_path, "n", None)
    example = {"x": torch.zeros(2, 3, 4), "k": np.array([1, 4])}
    x, k = imported(path, example=example).specs
    assert (x.shape, x.values) == (("n", 3, 4), None)
    assert (k.shape, k.values.min, k.values.max) == (("n",), 1, 4)  # type: ignore[union-attr]
    x, k = imported(path, example=example["x"], shapes={"x": (None, "t", None)}).specs
    assert (x.shape, k.shape, k.values) == (("n", "t", 4), ("n",), None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"shapes": {"z": ("n",)}}, "the model has no input 'z'"),
        ({"shapes": {"x": ("n", "t")}}, r"input 'x' has 3 axes, \['n', None, 4\], and is given 2: \['n', 't'\]"),
        ({"shapes": {"x": ("n", None, 4)}}, "axis 1 is dynamic and has no name"),
        ({"example": {"k": np.zeros(2, np.int32)}}, "input 'k' is int64 in the model and int32 in its example"),
        ({"example": torch.zeros(2, 4)}, r"input 'x' has 3 axes, \['n', None, 4\], and is given 2: \[2, 4\]"),
        ({"example": [np.zeros(1)] * 3}, "example_inputs has 3 values, and the model 2 inputs"),
    ],
)
def test_what_does_not_fit(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        imported(saved(tmp_path, "n", None), **more)


def test_convert_takes_shapes_and_example(tmp_path: Path) -> None:
    path = saved(tmp_path, -1, "?")
    artifact = trtforge.convert(
        path,
        {"k": np.array([0, 4])},
        tmp_path / "made",
        dims={"n": (1, 2, 4), "t": (1, 3, 6)},
        inputs={"x": ("n", "t", 4), "k": ("n",)},
    )
    assert [tuple(item["shape"]) for item in artifact.facts["inputs"]] == [("n", "t", 4), ("n",)]
    assert artifact.status in ("portable", "built", "validated")
