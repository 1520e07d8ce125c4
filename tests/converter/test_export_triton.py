"""`trtforge export-triton`: what Triton's own schema makes of the repository. No server runs here."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from tiny_models import entry, run, write_tiny

import trtforge
from trtforge.converter.manifest import write_manifest
from trtforge.converter.triton_config import TritonModel, find_batch_dim, render_config
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.specs import DTYPES, DimRange, TensorSpec


@pytest.fixture(scope="module")
def schema() -> Any:
    """`model_config_pb2` of tritonclient, by its file: the package around it wants grpcio."""
    spec = importlib.util.find_spec("tritonclient")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    path = Path(spec.submodule_search_locations[0]) / "grpc/model_config_pb2.py"
    found = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert found is not None
    assert found.loader is not None
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def parse(schema: Any, text: str) -> Any:
    from google.protobuf import text_format

    return text_format.Parse(text, schema.ModelConfig())


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a TensorRT that is not installed here: its ONNX is proved."""
    folder = tmp_path_factory.mktemp("portable")
    write_tiny(folder, {"tiny": entry(target={"backend": "tensorrt"})})
    done = run(folder, "convert", "tiny.yaml", "--output", "out")
    assert done.returncode == 0, done.stderr
    return folder / "out/tiny"


def with_engine(
    portable: Path, place: Path, backend: str = "tensorrt", status: str = "validated", seed: int = 0
) -> Path:
    """The artifact as that backend's release would leave it; the engine's bytes stand for a plan and are never run."""
    shutil.copytree(portable, place)
    facts = dict(trtforge.open_artifact(portable).facts)
    (place / "model.engine").write_bytes(np.random.default_rng(seed).bytes(300))
    for key in ("schema", "status", "name", "files"):
        facts.pop(key)
    facts["engine"] = {"backend": backend, "version": "11.4.0", "tf32": False, "sha256": "", "size": 300}
    write_manifest(place, status, "tiny", facts)  # type: ignore[arg-type]
    return place


def test_an_engine_becomes_a_model(schema: Any, portable: Path, tmp_path: Path) -> None:
    artifact = with_engine(portable, tmp_path / "tiny")
    done = run(tmp_path, "export-triton", "tiny", "repository", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == 1
    model = tmp_path / "repository/tiny"
    assert sorted(p.relative_to(model).as_posix() for p in model.rglob("*")) == ["1", "1/model.plan", "config.pbtxt"]
    assert (model / "1/model.plan").read_bytes() == (artifact / "model.engine").read_bytes()
    config = parse(schema, (model / "config.pbtxt").read_text())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "tensorrt", 4)
    assert [(x.name, x.data_type, list(x.dims)) for x in config.input] == [("x", schema.TYPE_FP32, [4])]
    assert [(x.name, x.data_type, list(x.dims)) for x in config.output] == [("y", schema.TYPE_FP32, [4])]
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 4]
    (group,) = config.instance_group
    assert (group.count, group.kind, list(group.profile)) == (1, schema.ModelInstanceGroup.KIND_GPU, ["0"])
    (warm,) = config.model_warmup
    assert (warm.batch_size, list(warm.inputs["x"].dims)) == (2, [4])


def test_versions_follow_and_stay(schema: Any, portable: Path, tmp_path: Path) -> None:
    for seed, expected in ((0, (1, True)), (0, (1, False)), (1, (2, True))):
        shutil.rmtree(tmp_path / "tiny", ignore_errors=True)
        with_engine(portable, tmp_path / "tiny", seed=seed)
        done = run(tmp_path, "export-triton", "tiny", "repository", "--json")
        found = json.loads(done.stdout)
        assert (found["version"], found["added"]) == expected
    model = tmp_path / "repository/tiny"
    assert {path.name for path in model.iterdir()} == {"1", "2", "config.pbtxt"}
    first, second = ((model / version / "model.plan").read_bytes() for version in "12")
    assert first != second
    assert [path.name for path in model.parent.iterdir()] == ["tiny"]  # nothing staged is left
    # Another interface under the same name would break the clients of the versions before.
    done = run(tmp_path, "export-triton", "tiny", "repository", "--onnx")
    assert done.returncode == 5
    assert "another configuration" in done.stderr


@pytest.mark.parametrize(
    ("backend", "status", "options", "code", "words"),
    [
        ("tensorrt-rtx", "validated", (), 5, "Triton does not load"),
        ("tensorrt", "built", (), 5, "has never run"),
        ("tensorrt", "built", ("--allow-unvalidated",), 0, ""),
        ("tensorrt-rtx", "built", ("--onnx",), 0, ""),
        ("tensorrt", "failed", ("--onnx",), 5, "failed its proof"),
        ("tensorrt", "failed", ("--allow-unvalidated",), 5, "failed its proof"),
        ("tensorrt", "validated", ("--name", "../x"), 2, "cannot be a model's name"),
    ],
)
def test_what_is_refused(
    portable: Path, tmp_path: Path, backend: str, status: str, options: tuple[str, ...], code: int, words: str
) -> None:
    with_engine(portable, tmp_path / "tiny", backend, status)
    done = run(tmp_path, "export-triton", "tiny", "repository", *options)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "repository/tiny/config.pbtxt").exists() == (code == 0)


def test_a_foreign_folder_and_an_altered_artifact(portable: Path, tmp_path: Path) -> None:
    artifact = with_engine(portable, tmp_path / "tiny")
    theirs = tmp_path / "repository/tiny"
    theirs.mkdir(parents=True)
    (theirs / "config.pbtxt").write_text('name: "tiny"\n')
    done = run(tmp_path, "export-triton", "tiny", "repository")
    assert done.returncode == 5
    assert "not written by trtforge" in done.stderr
    assert (theirs / "config.pbtxt").read_text() == 'name: "tiny"\n'
    (artifact / "model.engine").write_bytes(b"other")
    done = run(tmp_path, "export-triton", "tiny", "elsewhere")
    assert done.returncode == 5
    assert not (tmp_path / "elsewhere").exists()


def test_the_proved_onnx_runs_from_the_repository(schema: Any, portable: Path, tmp_path: Path) -> None:
    import onnxruntime

    done = run(tmp_path, "export-triton", str(portable), "repository", "--onnx", "--name", "other")
    assert done.returncode == 0, done.stderr
    model = tmp_path / "repository/other"
    config = parse(schema, (model / "config.pbtxt").read_text())
    assert (config.backend, config.default_model_filename, config.max_batch_size) == ("onnxruntime", "model.onnx", 4)
    assert not config.instance_group[0].profile
    session = onnxruntime.InferenceSession(str(model / "1/model.onnx"))
    feeds = {x.name: np.ones((3, *x.dims), np.float32) for x in config.input}
    (y,) = session.run([x.name for x in config.output], feeds)
    assert y.shape == (3, *config.output[0].dims)


def test_rows_that_look_at_each_other_are_not_batched(schema: Any, tmp_path: Path) -> None:
    """The first dimension is a sequence: joined requests would be one sequence."""
    write_tiny(tmp_path, {"tiny": entry(target={"backend": "tensorrt"})})
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[n,4] x) => (float[n,4] y) {
      t = Transpose(x) s = MatMul(x, t) p = Softmax(s) y = MatMul(p, x) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "tiny.onnx")
    assert run(tmp_path, "convert", "tiny.yaml", "--output", "out").returncode == 0
    done = run(tmp_path, "export-triton", "out/tiny", "repository", "--onnx")
    assert done.returncode == 0, done.stderr
    assert "depend on each other" in done.stdout
    config = parse(schema, (tmp_path / "repository/tiny/config.pbtxt").read_text())
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, [-1, 4])
    assert not config.HasField("dynamic_batching")


def test_every_dtype_and_name_round_trips(schema: Any) -> None:
    inputs = tuple(TensorSpec(f'in "{dtype}" \\ é', dtype, ("b", 3, "seq")) for dtype in DTYPES)
    outputs = (TensorSpec("scalar", "float32", ("b",)),)
    profiles = (
        {"b": DimRange(1, 2, 4), "seq": DimRange(1, 8, 16)},
        {"b": DimRange(4, 8, 32), "seq": DimRange(1, 8, 16)},
    )
    assert find_batch_dim(inputs, outputs, profiles) == "b"
    model = TritonModel("m", "tensorrt", "model.plan", inputs, outputs, profiles, "b", {"k": 'v"\n'})
    config = parse(schema, render_config(model))
    assert [x.name for x in config.input] == [spec.name for spec in inputs]
    names = {"float": "FP", "bfloat": "BF"}
    for spec, parsed in zip(inputs, config.input, strict=True):
        word = spec.dtype.rstrip("0123456789")
        expected = f"TYPE_{names.get(word, word.upper())}{spec.dtype[len(word) :]}"
        assert schema.DataType.Name(parsed.data_type) == expected
        assert list(parsed.dims) == [3, -1]
    assert (list(config.output[0].dims), config.output[0].HasField("reshape")) == ([1], True)
    assert list(config.output[0].reshape.shape) == []
    assert config.max_batch_size == 32
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 8, 32]
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert [(w.batch_size, list(w.inputs[inputs[0].name].dims)) for w in config.model_warmup] == [
        (2, [3, 8]),
        (8, [3, 8]),
    ]
    assert config.model_warmup[0].inputs[inputs[0].name].random_data
    assert config.model_warmup[0].inputs[inputs[-1].name].zero_data
    assert config.parameters["k"].string_value == 'v"\n'


@pytest.mark.parametrize(
    ("shapes", "profiles"),
    [
        ([("b", 3), (4, 3)], [{"b": (1, 2, 4)}]),  # not the first of every tensor
        ([("b", "b"), ("b", 3)], [{"b": (1, 2, 4)}]),  # an affinity matrix: joined requests are another one
        ([("b", 3), ("b", 3)], [{"b": (2, 2, 4)}]),  # Triton would send a batch of 1
        ([("b", 3), ("b", 3)], [{"b": (1, 1, 1)}, {"b": (8, 8, 8)}]),  # and one of 5
        ([(8, 3), (8, 3)], [{}]),
        ([(), ()], [{}]),
    ],
)
def test_no_batch_dimension(
    shapes: list[tuple[int | str, ...]], profiles: list[dict[str, tuple[int, int, int]]]
) -> None:
    x, y = (TensorSpec(name, "float32", shape) for name, shape in zip("xy", shapes, strict=True))
    assert find_batch_dim([x], [y], [{k: DimRange(*v) for k, v in p.items()} for p in profiles]) is None


def test_a_dtype_that_triton_lacks() -> None:
    spec = TensorSpec("x", "float8e4m3fn", (1,))
    with pytest.raises(ArtifactError, match="no type"):
        render_config(TritonModel("m", "tensorrt", "model.plan", (spec,), (), ({},), None, {}))
