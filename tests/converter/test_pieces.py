"""Engines of cut-out pieces: built for real, since RTX needs no GPU for that, and run by onnxruntime in their place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import trtforge
from trtforge.converter.bisect import bisect_folder
from trtforge.converter.pieces import engine_opener, open_onnx, run_with
from trtforge.converter.progress import Stages
from trtforge.runtime.errors import MissingDependencyError
from trtforge.runtime.graph import load_graph
from trtforge.runtime.runner import Array, Runner, Tensors
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.trt.backend import find_backend


class Stand:
    """Runs the ONNX that an engine was built from, on onnxruntime."""

    opened: list[Path] = []  # noqa: RUF012 - one test, one list
    closed = 0

    def __init__(self, engine: Path, backend: str) -> None:
        assert engine.stat().st_size > 1000  # a plan file of TensorRT's
        Stand.opened.append(engine)
        self._context = open_onnx(load_graph(engine.with_suffix(".onnx")), [])
        self._runner: Runner = self._context.__enter__()

    @property
    def name(self) -> str:
        return "stand"

    @property
    def version(self) -> str:
        return "1"

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._runner.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._runner.outputs

    def run(self, feeds: Tensors) -> dict[str, Array]:
        return self._runner.run(feeds)

    def close(self) -> None:
        self._context.__exit__(None, None, None)
        Stand.closed += 1


def test_pieces_are_built_and_run_through_the_seam(tmp_path: Path) -> None:
    try:
        backend = find_backend("tensorrt-rtx")
    except MissingDependencyError:
        pytest.skip("tensorrt-rtx is not installed")
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    settings = {"dims": {"batch": (1, 4, 8)}, "inputs": {"input": ("batch", 8)}}
    trtforge.convert(net, torch.randn(4, 8), tmp_path / "net", precision="fp16", **settings)
    work = tmp_path / "work"
    work.mkdir()
    opener = engine_opener(backend.name, work, tf32=False, make_runner=Stand)
    found = bisect_folder(tmp_path / "net", Stages(lambda event: None), open_candidate=opener, runner="stand 1")
    assert (found.outcome, found.runner) == ("agrees", "stand 1")
    assert len(Stand.opened) == Stand.closed >= 3
    assert list(work.iterdir()) == []


def test_feeds_are_cast_to_what_the_graph_takes(tmp_path: Path) -> None:
    import onnx
    import onnx_ir as ir

    text = '<ir_version: 10, opset_import: ["": 20]> g (float16[n] x) => (float16[n] y) { y = Neg(x) }'
    proto = onnx.parser.parse_model(text)
    (found,) = run_with(open_onnx)(ir.from_proto(proto), [{"x": np.array([1, 7e4], np.float32), "other": np.zeros(1)}])
    assert found["y"].tolist() == [-1, -np.inf]
