"""Small graphs as text, what onnxruntime makes of them, and whether RTX builds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from trtforge.calibration.ranges import Ranges, TensorRange
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.trt.build import BuildRequest, build_engine

Feeds = Mapping[str, np.ndarray]


@pytest.fixture
def parse_graph() -> Callable[..., ir.Model]:
    """`parse_graph(text, weights, opset=20)`: a graph in ONNX's text form with seeded weights and an id for every node.

    `text` is `(inputs) => (outputs) { nodes }`; `weights` maps names to shapes (standard normal over the square root of
    what is summed) or arrays. Ids are `<OpType>#k` unless the text has `[name]` before a node.
    """

    def parse(text: str, weights: Mapping[str, Any], opset: int = 20) -> ir.Model:
        rng = np.random.default_rng(0)
        arrays = {
            name: given
            if isinstance(given, np.ndarray)
            else (rng.standard_normal(given) / np.sqrt(max(1, np.prod(given) / max(given[:1] or (1,))))).astype(
                np.float32
            )
            for name, given in weights.items()
        }
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> graph {text}')
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
        counts: dict[str, int] = {}
        for node in proto.graph.node:
            number = counts.setdefault(node.op_type, 0)
            counts[node.op_type] += 1
            node.name = node.name or f"{node.op_type}#{number}"
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        onnx.checker.check_model(proto, full_check=True)
        return ir.from_proto(proto)

    return parse


@pytest.fixture
def random_feeds() -> Callable[..., dict[str, np.ndarray]]:
    """`random_feeds(model, size=4)`: seeded inputs; named dimensions get `size`."""

    def make(model: ir.Model, size: int = 4) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(1)
        feeds = {}
        for value in model.graph.inputs:
            assert value.shape is not None
            assert value.dtype is not None
            shape = [dim if isinstance(dim, int) else size for dim in value.shape]
            array = rng.integers(0, 8, shape) if value.dtype.is_integer() else rng.standard_normal(shape)
            feeds[value.name or ""] = array.astype(value.dtype.numpy())
        return feeds

    return make


@pytest.fixture
def run_model() -> Callable[..., dict[str, np.ndarray]]:
    """`run_model(model, feeds, extra=())`: outputs and tensors as float64, Q/DQ executed as they are written."""

    def run(model: ir.Model, feeds: Feeds, extra: Sequence[str] = ()) -> dict[str, np.ndarray]:
        proto = ir.to_proto(model).SerializeToString()
        runner = OnnxRuntimeRunner(proto, disable_quant_qdq=True, extra_outputs=extra, threads=1)
        inputs = {spec.name: np.asarray(feeds[spec.name]).astype(_numpy(spec.dtype)) for spec in runner.inputs}
        return {name: array.astype(np.float64) for name, array in runner.run(inputs).items()}

    return run


def _numpy(name: str) -> Any:
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


@pytest.fixture
def max_ranges(run_model: Callable[..., dict[str, np.ndarray]]) -> Callable[..., Ranges]:
    """`max_ranges(model, names, feeds)`: the largest |x| of each tensor over one set of inputs."""

    def measure(model: ir.Model, names: Sequence[str], feeds: Feeds) -> Ranges:
        produced = run_model(model, feeds, [name for name in names if name not in feeds])
        arrays = {name: np.asarray(feeds[name]) if name in feeds else produced[name] for name in names}
        return Ranges({name: TensorRange(float(np.float32(np.abs(a).max())), "max") for name, a in arrays.items()})

    return measure


@pytest.fixture
def build_rtx(tmp_path: Path) -> Callable[..., None]:
    """`build_rtx(model, size=4)`: checks the model in full and builds it with TensorRT-RTX on the CPU."""
    pytest.importorskip("tensorrt_rtx")

    def build(model: ir.Model, size: int = 4) -> None:
        path = tmp_path / "model.onnx"
        ir.save(model, path)
        onnx.checker.check_model(path, full_check=True)
        profile = {}
        for value in model.graph.inputs:
            assert value.shape is not None
            shapes = [[dim if isinstance(dim, int) else end for dim in value.shape] for end in (1, size, 2 * size)]
            if shapes[0] != shapes[2]:
                profile[value.name or ""] = tuple(tuple(shape) for shape in shapes)
        request = BuildRequest(
            path, tmp_path / "model.engine", "tensorrt-rtx", (profile,) if profile else (), tf32=False
        )
        built = build_engine(request)
        assert built.size_bytes > 0

    return build
