"""What runs the pieces of a graph that a bisection cuts out: onnxruntime here, TensorRT engines where a GPU is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from trtforge.converter.probes import detach_weights
from trtforge.runtime.graph import save_graph
from trtforge.runtime.inputs import numpy_dtype
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.runner import Array, Runner, Tensors
from trtforge.validation.bisect import Run
from trtforge.validation.emulate import emulate, needs_emulation
from trtforge.validation.metrics import is_float

__all__ = ["Closable", "Open", "engine_opener", "open_onnx", "run_with"]

Open = Callable[[ir.Model, Sequence[Tensors]], contextlib.AbstractContextManager[Runner]]
"""A runner for a graph, good for the shapes of the given inputs; it is closed after use."""


def run_with(open_runner: Open) -> Run:
    """A `Run`: opens a runner for the graph, feeds it each sample in the types that it takes, and closes it."""

    def run(model: ir.Model, samples: Sequence[Tensors]) -> list[dict[str, Array]]:
        names = [value.name or "" for value in model.graph.inputs]
        fed = [{name: sample[name] for name in names} for sample in samples]
        with open_runner(model, fed) as runner:
            dtypes = {spec.name: spec.dtype for spec in runner.inputs}
            return [runner.run({name: _cast(array, dtypes[name]) for name, array in s.items()}) for s in fed]

    return run


@contextlib.contextmanager
def open_onnx(model: ir.Model, samples: Sequence[Tensors]) -> Iterator[Runner]:
    """Onnxruntime in this process; half precision is emulated as in the proof."""
    del samples  # it takes any shape
    graph = emulate(model) if needs_emulation(model) else model.clone()
    weights = detach_weights(graph)
    yield OnnxRuntimeRunner(ir.to_proto(graph).SerializeToString(), disable_quant_qdq=True, weights=weights)


class Closable(Runner, Protocol):
    """A runner that holds something of the GPU's."""

    def close(self) -> None: ...


def engine_opener(
    backend: str, work: Path, *, tf32: bool, make_runner: Callable[[Path, str], Closable] | None = None
) -> Open:
    """Builds an engine of each graph in a child process, with a profile for the samples' shapes, and runs it here.

    Args:
        backend: "tensorrt" or "tensorrt-rtx".
        work: A folder for ONNX files and engines; its owner deletes it.
        tf32: As the engine under suspicion was built.
        make_runner: What runs an engine's file; by default `EngineRunner`, which needs a GPU.
    """
    count = 0

    @contextlib.contextmanager
    def open_engine(model: ir.Model, samples: Sequence[Tensors]) -> Iterator[Runner]:
        from trtforge.runtime.trt.build import BuildRequest, build_engine
        from trtforge.runtime.trt.execute import EngineRunner

        nonlocal count
        count += 1
        stem = work / f"piece-{count}"
        saved = save_graph(model, stem.with_suffix(".onnx"))
        dynamic = [spec.name for spec in saved.inputs if any(isinstance(dim, str) for dim in spec.shape)]
        shapes = dict.fromkeys(tuple(sample[name].shape for name in dynamic) for sample in samples)
        profiles = tuple(
            {name: (shape,) * 3 for name, shape in zip(dynamic, found, strict=True)} for found in shapes if found
        )
        built = build_engine(BuildRequest(saved.path, stem.with_suffix(".engine"), backend, profiles, tf32))
        try:
            with contextlib.closing((make_runner or EngineRunner)(built.path, built.backend)) as runner:
                yield runner
        finally:
            for path in (*saved.files, built.path):
                path.unlink(missing_ok=True)

    return open_engine


def _cast(array: Array, dtype: str) -> Array:
    if array.dtype.name == dtype or not is_float(array):
        return array
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, as in a Cast
        return array.astype(numpy_dtype(dtype))
