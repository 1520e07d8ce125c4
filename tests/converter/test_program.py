"""Exported programs: the user's names and ranges, what does not fit, and files that would run code."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_corpus import run_model

import trtforge
from trtforge.converter.config import ConversionConfig, Source
from trtforge.converter.program import ProgramCall, export_program, open_program
from trtforge.converter.program_archive import read_program
from trtforge.converter.sources import load_source
from trtforge.runtime.errors import ConfigError, ExportError
from trtforge.runtime.graph import load_graph, node_module
from trtforge.runtime.specs import DimRange, InputSpec, ValueRange
from trtforge.runtime.torch_runner import TorchRunner

# torch's own: a deprecated copyreg use while it saves, and sympy's on some releases
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

BATCH = {"batch": DimRange(1, 4, 16)}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.ReLU())
        self.table = torch.nn.Embedding(9, 6)

    def forward(
        self, x: torch.Tensor, ids: torch.Tensor, scale: float = 2.0, *, mask: torch.Tensor | None = None
    ) -> dict[str, Any]:
        y = self.body(x) * scale + self.table(ids)
        if mask is not None:
            y = torch.where(mask[:, None], y, 0.0)
        return {"features": y, "both": (y.sum(1), x.shape[0] * y)}


def program(low: int = 1, high: int = 16, *, train: bool = False) -> torch.export.ExportedProgram:
    torch.manual_seed(0)
    model = Net().train(train)
    batch = torch.export.Dim("batch", min=low, max=high)
    args = (torch.randn(4, 4), torch.tensor([1, 7, 3, 2]))
    mask = {"mask": torch.tensor([True, False, True, True])}
    dynamic = {"x": {0: batch}, "ids": {0: batch}, "mask": {0: batch}}
    return torch.export.export(model, args, mask, dynamic_shapes=dynamic)


def shapes(name: str = "batch") -> dict[str, Any]:
    return {"x": (name, 4), "ids": (name,), "mask": (name,)}


def opened(given: Mapping[str, Any] | None = None, dims: dict[str, DimRange] | None = None) -> ProgramCall:
    return open_program(program(), given=given or shapes(), profiles=[BATCH if dims is None else dims])


def saved(folder: Path, name: str = "net.pt2") -> Path:
    path = folder / name
    torch.export.save(program(), path)
    return path


@pytest.mark.parametrize("from_file", [False, True])
def test_names_dimensions_modules_and_results_are_the_users(tmp_path: Path, from_file: bool) -> None:
    source = read_program(saved(tmp_path)) if from_file else program()
    call = open_program(source, given=shapes(), profiles=[BATCH])
    model = export_program(call, output_names=None, opset=20, folder=tmp_path)
    assert [(s.name, s.dtype, s.shape) for s in model.inputs] == [
        ("x", "float32", ("batch", 4)), ("ids", "int64", ("batch",)), ("mask", "bool", ("batch",)),
    ]  # fmt: skip
    assert [(s.name, s.shape) for s in model.outputs] == [
        ("features", ("batch", 6)), ("both.0", ("batch",)), ("both.1", ("batch", 6)),
    ]  # fmt: skip
    proto = onnx.load(model.path)
    assert "s77" not in str(proto)
    assert {"body.0.weight", "table.weight"} <= {tensor.name for tensor in proto.graph.initializer}
    assert {"body.0", "table"} <= {node_module(node) for node in load_graph(model.path).graph}
    assert call.example.specs[1].values == ValueRange(1, 7)
    runner = TorchRunner(call.module, call.call, model.inputs, model.outputs)
    random = np.random.default_rng(0)
    for size in (1, 5):
        feeds: dict[str, Any] = {
            "x": random.standard_normal((size, 4)).astype(np.float32),
            "ids": random.integers(0, 9, size),
            "mask": random.random(size) > 0.5,
        }
        found = run_model(proto, feeds)
        for name, array in runner.run(feeds).items():
            np.testing.assert_allclose(found[name], array, atol=1e-5)


def test_pipeline_from_python_and_from_a_file(tmp_path: Path) -> None:
    for number, source in enumerate((program(), saved(tmp_path), str(saved(tmp_path)))):
        artifact = trtforge.convert(
            source, None, tmp_path / f"out{number}", dims={"batch": (1, 4, 16)}, inputs=shapes(), precision="fp16"
        )
        assert artifact.status in ("built", "validated")


def test_a_size_in_place_of_a_name_makes_a_dimension_static(tmp_path: Path) -> None:
    call = opened({"x": (3, 4), "ids": (3,), "mask": (3,)}, {})
    model = export_program(call, output_names=["a", "b", "c"], opset=20, folder=tmp_path)
    assert [(s.name, s.shape) for s in (*model.inputs, *model.outputs)] == [
        ("x", (3, 4)), ("ids", (3,)), ("mask", (3,)), ("a", (3, 6)), ("b", (3,)), ("c", (3, 6)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "dims", "error", "message"),
    [
        ({}, {}, ConfigError, r"axis 0 of input 'x' is dynamic in the program \(1 to 16\) and has no name"),
        ({**shapes(), "xx": (1,)}, BATCH, ConfigError, "no input 'xx'"),
        ({**shapes(), "x": ("batch", 5)}, BATCH, ConfigError, "axis 1 of input 'x' is 4 in the program and 5"),
        ({**shapes(), "x": ("batch", 4, 1)}, BATCH, ConfigError, "has 2 axes"),
        ({**shapes(), "x": ("n", 4)}, {**BATCH, "n": BATCH["batch"]}, ConfigError, "give them one name"),
        ({**shapes(), "x": ("n", 4)}, BATCH, ConfigError, "'n' .* has no range"),
        (shapes(), {**BATCH, "other": BATCH["batch"]}, ConfigError, "'other' is in no input's shape"),
        (shapes(), {"batch": DimRange(1, 4, 32)}, ConfigError, r"\[1, 32\], and the program was exported for 1 to 16"),
        ({**shapes(), "x": ("batch", "batch")}, BATCH, ExportError, "dimension 'batch' froze at 4: axis 1"),
        ({"x": InputSpec("x", "int64", ("batch", 4))}, BATCH, ConfigError, "float32 in the program and int64"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_program(
    given: dict[str, Any], dims: dict[str, DimRange], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_program(program(), given=given, profiles=[dims])


def test_a_derived_dimension_is_explained() -> None:
    half = torch.export.Dim("half", min=2, max=8)
    model = torch.nn.Sequential(torch.nn.Unflatten(0, (-1, 2)))
    source = torch.export.export(model, (torch.randn(8, 3),), dynamic_shapes=({0: 2 * half},))
    with pytest.raises(ExportError, match=r"axis 0 of input 'input' is 2\*s\d+ in the program"):
        open_program(source, given={"input": ("n", 3)}, profiles=[{"n": DimRange(4, 8, 16)}])


def test_training_mode_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    source = torch.export.export(model, (torch.randn(4, 3),))
    with pytest.raises(ConfigError, match="training mode: dropout"):
        open_program(source, given={}, profiles=[{}])


# What a hostile file could do: each marks the folder "ran" if anything in it is executed.


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], extra: Mapping[str, bytes] | None = None) -> Path:
    out = path.with_name(f"evil{len(list(path.parent.iterdir()))}.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for info in source.infolist():
            target.writestr(info.filename, change(info.filename, source.read(info)))
        folder = source.namelist()[0].partition("/")[0]
        for name, content in (extra or {}).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # names that are there already
                target.writestr(f"{folder}/{name}", content)
    return out


def evil_pickle(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": Evil(marker)}, buffer)
    return buffer.getvalue()


def in_model(old: str, new: str) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        assert old.encode() in content
        return content.replace(old.encode(), json.dumps(new)[1:-1].encode())

    return change


def test_files_that_would_run_code_are_refused(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", saved(tmp_path)
    size = json.dumps(next(text for text in expressions(path) if text.startswith("Symbol(")))[1:-1]
    mkdir = f"__import__('os').mkdir('{marker}')"

    def same(name: str, content: bytes) -> bytes:
        return content

    attacks = {
        rewritten(path, in_model(size, mkdir)): "no arithmetic",
        rewritten(path, in_model(size, f"Symbol('s0').__class__.__base__('{marker}')")): "no arithmetic",
        rewritten(path, in_model("torch.ops.aten.relu.default", "torch.os.mkdir")): "no operator",
        rewritten(path, in_model("torch.ops.aten.relu.default", "_operator.methodcaller")): "no operator",
        rewritten(path, same, {"data/aotinductor/model/x.so": b"\x7fELF"}): "native code",
        rewritten(path, same, {"data/constants/custom_obj_0": evil_pickle(marker)}): "pickled object",
        rewritten(path, same, {"data/constants/opaque_obj_0": pickle.dumps(Evil(marker))}): "pickled object",
        rewritten(path, same, {"models/model.json": b"{}"}): "twice",
    }
    for attack, reason in attacks.items():
        with pytest.raises(ConfigError, match=f"{reason}.*is not loaded"):
            read_program(attack)
        assert not marker.exists()


def test_a_pickle_among_the_samples_is_not_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = evil_pickle(marker)

    def change(name: str, content: bytes) -> bytes:
        return evil if "sample_inputs" in name else content

    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with pytest.raises(ExportError, match="cannot be loaded"):
        read_program(rewritten(saved(tmp_path), change))
    assert not marker.exists()
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == before


def test_guards_in_the_file_are_not_compiled(tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", saved(tmp_path)

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return content
        data = json.loads(content)
        data["guards_code"] = [f"__import__('os').mkdir({str(marker)!r}) is None"]
        return json.dumps(data).encode()

    call = open_program(read_program(rewritten(path, change)), given=shapes(), profiles=[BATCH])
    call.call(*call.example.tensors)
    assert not marker.exists()


def expressions(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("models/model.json"))
        text = archive.read(name).decode()
    return [json.loads(f'"{part}"') for part in re.findall(r'"expr_str": "((?:[^"\\]|\\.)*)"', text)]


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + b"\0" * 60])
def test_what_is_no_program(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"net\.pt2 is not a \.pt2 file"):
        read_program(path)
    torch.save({"w": torch.zeros(2)}, path)
    with pytest.raises(ExportError, match="holds no exported program"):
        read_program(path)


def test_a_file_cut_off_anywhere(tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 7):
        path.write_bytes(whole[:size])
        with pytest.raises((ExportError, ConfigError), match=r"net\.pt2"):
            read_program(path)


def test_a_missing_file_and_weights_that_are_not_finite(tmp_path: Path) -> None:
    def load(path: Path) -> object:
        return load_source(ConversionConfig("m", source=Source(exported_program=path)))

    with pytest.raises(ConfigError, match=r"exported program .*no\.pt2 does not exist"):
        load(tmp_path / "no.pt2")
    source = program()
    with torch.no_grad():
        source.state_dict["body.0.bias"][0] = float("inf")
    torch.export.save(source, tmp_path / "bad.pt2")
    with pytest.raises(ConfigError, match=r"NaN or Inf: body\.0\.bias"):
        load(tmp_path / "bad.pt2")
