from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx_corpus import CORPUS, Case, run_model

from trtforge.converter.foreign import Imported, import_onnx
from trtforge.runtime.errors import ConfigError, ExportError
from trtforge.runtime.graph import all_graphs, load_graph
from trtforge.runtime.specs import DimRange, InputSpec

DIMS = {"batch": DimRange(1, 2, 8), "length": DimRange(1, 5, 16), "B": DimRange(1, 2, 8)}


def load(case: Case, folder: Path, *, opset: int | None = None, inputs: tuple[InputSpec, ...] = ()) -> Imported:
    path = folder / "source.onnx"
    onnx.save(case.proto(), path)
    return import_onnx(path, profiles=[DIMS], inputs=inputs, opset=opset, folder=folder)


def named(name: str) -> Case:
    return next(case for case in CORPUS if case.name == name)


@pytest.mark.parametrize("opset", [None, 20])
@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_results_and_interface_stay(case: Case, opset: int | None, tmp_path: Path) -> None:
    imported = load(case, tmp_path, opset=opset)
    proto = onnx.load(imported.model.path)
    onnx.checker.check_model(proto, full_check=True)
    assert imported.model.opset >= (opset or 13)
    before, after = case.expected(2), run_model(proto, case.feeds(2))
    assert list(before) == list(after) == [spec.name for spec in imported.model.outputs]
    for name, array in before.items():
        np.testing.assert_allclose(array, after[name], rtol=1e-6, atol=1e-6)
    assert [spec.name for spec in imported.specs] == list(case.feeds(2))


def test_conversion_keeps_the_names_of_nodes(tmp_path: Path) -> None:
    imported = load(named("old_softmax"), tmp_path, opset=20)
    names = [node.name for node in load_graph(imported.model.path).graph]
    assert {"n0", "n2", "n3"} <= set(names)
    bodies = load(named("nested_bodies"), tmp_path, opset=21)
    names = [node.name for graph in all_graphs(load_graph(bodies.model.path)) for node in graph]
    assert "n2_body_3_else_branch_1" in names


def test_an_opset_that_is_imported_twice(tmp_path: Path) -> None:
    """As skl2onnx writes it; onnx's converter then gives a graph that says it is of the old one."""
    case = named("old_softmax")
    proto = case.proto()
    proto.opset_import.append(proto.opset_import[0])
    onnx.save(proto, tmp_path / "source.onnx")
    imported = import_onnx(tmp_path / "source.onnx", profiles=[DIMS], opset=20, folder=tmp_path)
    assert imported.model.opset == 20
    after = run_model(onnx.load(imported.model.path), case.feeds(2))
    for name, array in case.expected(2).items():
        np.testing.assert_allclose(after[name], array, rtol=1e-6, atol=1e-6)


def test_the_users_dimension_names_replace_the_files(tmp_path: Path) -> None:
    path = tmp_path / "source.onnx"
    onnx.save(named("lstm").proto(), path)
    spec = InputSpec("x", "float32", ("n", "t", 4))
    dims = {"n": DimRange(1, 2, 4), "t": DimRange(1, 4, 8)}
    imported = import_onnx(path, profiles=[dims], inputs=[spec], opset=None, folder=tmp_path)
    assert imported.model.inputs[0].shape == ("n", "t", 4)
    assert imported.model.outputs[0].shape == ("n", "t", 6)
    assert imported.specs == (spec,)


def test_a_range_of_one_size_makes_a_dimension_static(tmp_path: Path) -> None:
    path = tmp_path / "source.onnx"
    onnx.save(named("mlp").proto(), path)
    imported = import_onnx(path, profiles=[{"batch": DimRange(4, 4, 4)}], opset=None, folder=tmp_path)
    assert imported.model.inputs[0].shape == (4, 8)
    assert imported.model.outputs[0].shape == (4, 4)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (InputSpec("y", "float32", ("batch", 8)), ConfigError, "no input 'y'"),
        (InputSpec("x", "int64", ("batch", 8)), ConfigError, "float32 in the model and int64"),
        (InputSpec("x", "float32", ("batch", 8, 1)), ConfigError, "has 2 axes"),
        (InputSpec("x", "float32", ("batch", 9)), ConfigError, "axis 1 is 8 in the model and 9"),
        (InputSpec("x", "float32", ("batch", "length")), ExportError, "dimension 'length' froze at 8"),
        (InputSpec("x", "float32", ("other", 8)), ConfigError, "'other' .* has no range"),
    ],
)
def test_specs_that_do_not_fit(spec: InputSpec, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        load(named("mlp"), tmp_path, inputs=(spec,))


def changed_input(tmp_path: Path, *, rank: bool) -> Path:
    proto = named("mlp").proto()
    if rank:
        proto.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    else:
        proto.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "source.onnx")
    return tmp_path / "source.onnx"


def test_what_the_file_leaves_open_must_be_given(tmp_path: Path) -> None:
    spec = InputSpec("x", "float32", ("batch", 8))
    for rank, message in ((True, "axis 0 is dynamic and has no name"), (False, "has no rank")):
        path = changed_input(tmp_path, rank=rank)
        with pytest.raises(ConfigError, match=message):
            import_onnx(path, profiles=[DIMS], opset=None, folder=tmp_path)
        imported = import_onnx(path, profiles=[DIMS], inputs=[spec], opset=None, folder=tmp_path)
        assert imported.model.inputs[0].shape == ("batch", 8)


def external(tmp_path: Path) -> Path:
    path = tmp_path / "source.onnx"
    onnx.save_model(named("mlp").proto(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data_is_followed(tmp_path: Path) -> None:
    path = external(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    imported = import_onnx(path, profiles=[DIMS], opset=None, folder=out)
    found = run_model(onnx.load(imported.model.path), named("mlp").feeds(2))
    np.testing.assert_array_equal(found["y"], named("mlp").expected(2)["y"])


def test_external_data_that_is_missing_or_short(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = tmp_path / "weights.bin"
    os.truncate(data, data.stat().st_size - 4)
    with pytest.raises(ExportError, match=r"weights\.bin has \d+ bytes, the weight '.+' ends at byte \d+"):
        import_onnx(path, profiles=[DIMS], opset=None, folder=tmp_path)
    data.unlink()
    with pytest.raises(ExportError, match="which does not exist"):
        import_onnx(path, profiles=[DIMS], opset=None, folder=tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x08\x07", b"\xff" * 64])
def test_what_is_no_onnx(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "source.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"source\.onnx"):
        import_onnx(path, opset=None, folder=tmp_path)


def test_a_file_cut_off_anywhere(tmp_path: Path) -> None:
    whole = named("mlp").proto().SerializeToString()
    path = tmp_path / "source.onnx"
    for size in range(1, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(ExportError, match=r"source\.onnx"):
            import_onnx(path, profiles=[DIMS], opset=None, folder=tmp_path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no file"):
        import_onnx(tmp_path / "no.onnx", opset=None, folder=tmp_path)


def test_an_invalid_graph(tmp_path: Path) -> None:
    proto = named("mlp").proto()
    proto.graph.node[1].input[0] = "nowhere"
    onnx.save(proto, tmp_path / "source.onnx")
    with pytest.raises(ExportError, match="is not valid ONNX"):
        import_onnx(tmp_path / "source.onnx", profiles=[DIMS], opset=None, folder=tmp_path)
