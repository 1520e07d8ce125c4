"""Runs what the artifact holds on the golden set and compares: the ONNX on onnxruntime, the engine on the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtforge.converter.progress import Stages
from trtforge.runtime.child import ChildCrashError
from trtforge.runtime.errors import ArtifactError, ExportError, ParityError
from trtforge.runtime.graph import OnnxModel, load_graph, save_graph
from trtforge.runtime.inputs import numpy_dtype
from trtforge.runtime.onnx_runner import run_onnx
from trtforge.runtime.precision import Precision
from trtforge.runtime.publish import hash_file
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.tensors import load_tensors, save_tensors
from trtforge.validation.compare import compare
from trtforge.validation.golden import INPUTS_FILE, GoldenSet, load_outputs
from trtforge.validation.parity import Candidate, ParityReport, Stage
from trtforge.validation.tolerance import Tolerance

__all__ = ["Bench", "prove_engine", "prove_onnx", "runnable_onnx"]

_HALF_NOTE = (
    "half precision is emulated: every fp16 or bf16 tensor is rounded to its type, with sums in float32 (onnxruntime's "
    "CPU provider computes fp16 graphs in float32, and has no bfloat16 kernels)"
)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every proof of one conversion shares.

    Attributes:
        golden: Inputs and PyTorch's outputs.
        proof: The folder that `golden` was saved to.
        work: A folder for intermediate files; its owner deletes it.
        stages: Receives progress and notes.
    """

    golden: GoldenSet
    proof: Path
    work: Path
    stages: Stages


def prove_onnx(
    model: OnnxModel, bench: Bench, *, stage: Stage, precision: Precision, used: set[Precision], tolerance: Tolerance
) -> ParityReport:
    """Runs an ONNX model on onnxruntime in a child process and compares it with the golden set.

    Half precision is emulated, and the report says so.

    Args:
        model: The graph.
        bench: The golden set and where to work.
        stage: "export" for the float graph, "precision" for the one with the plan carried out.
        precision: The plan's default, for the report.
        used: Every precision that a node runs in.
        tolerance: The limits.

    Raises:
        ParityError: onnxruntime failed or crashed on the graph.
        ArtifactError: the graph's file was removed meanwhile.
    """
    outputs = bench.work / f"{stage}.safetensors"
    run, note = runnable_onnx(model, used, bench.work / f"{stage}-emulated.onnx")
    feeds = _feeds_for(run.inputs, bench)
    try:
        facts = run_onnx(run.path, feeds, outputs, disable_quant_qdq=True, on_event=bench.stages.forward)
    except ChildCrashError as error:
        raise ParityError(
            f"onnxruntime crashed on the {stage} ONNX", why=error.what, fix="report this model's graph"
        ) from error
    except ExportError as error:
        if not run.path.exists():
            raise ArtifactError(f"{run.path} is gone", fix="something removed it: run this again") from error
        raise
    hashes = {"graph": model.hash, "file": hash_file(model.path)}
    candidate = Candidate(stage, facts["runner"], facts["version"], precision, hashes, note)
    return compare(bench.golden, load_outputs(outputs), tolerance, candidate, dtypes=_dtypes(model.outputs, bench))


def runnable_onnx(model: OnnxModel, used: set[Precision], place: Path) -> tuple[OnnxModel, str]:
    """The graph that shows on onnxruntime's CPU provider what `model` does, and how it differs, for the report.

    Args:
        model: The graph.
        used: Every precision that a node runs in; half precision is emulated.
        place: Where an emulated graph is written.
    """
    if not used & {"fp16", "bf16"}:
        return model, ""
    from trtforge.validation.emulate import emulate

    return save_graph(emulate(load_graph(model.path)), place), _HALF_NOTE


def prove_engine(
    engine: Path,
    backend: str,
    bench: Bench,
    *,
    graph: str,
    outputs: tuple[TensorSpec, ...],
    inputs: tuple[TensorSpec, ...],
    precision: Precision,
    tolerance: Tolerance,
    tf32: bool,
    version_compatible: bool = False,
    plugins: Sequence[Path] = (),
) -> ParityReport:
    """Runs an engine on the GPU in a child process and compares it with the golden set.

    Args:
        engine: The plan file.
        backend: "tensorrt" or "tensorrt-rtx".
        bench: The golden set and where to work.
        graph: Hash of the graph that it was built from.
        outputs: The graph's outputs.
        inputs: The graph's inputs.
        precision: The plan's default.
        tolerance: The limits.
        tf32: Whether it was built with TF32 allowed.
        version_compatible: Whether it was built to load on later releases.
        plugins: Libraries that it was built with.

    Raises:
        ArtifactError: it does not load on this machine.
        ParityError: it crashed.
    """
    from trtforge.runtime.trt.execute import run_engine

    results = bench.work / "engine.safetensors"
    try:
        feeds = _feeds_for(inputs, bench)
        facts = run_engine(
            engine,
            backend,
            feeds,
            results,
            on_event=bench.stages.forward,
            tf32=tf32,
            version_compatible=version_compatible,
            plugins=plugins,
        )
    except ChildCrashError as error:
        raise ParityError("the engine crashed on the golden set", why=f"{error.what}\n{error.why}") from error
    hashes = {"graph": graph, "engine": hash_file(engine)}
    candidate = Candidate("engine", facts["runner"], facts["version"], precision, hashes)
    return compare(bench.golden, load_outputs(results), tolerance, candidate, dtypes=_dtypes(outputs, bench))


def _feeds_for(inputs: tuple[TensorSpec, ...], bench: Bench) -> Path:
    """The golden inputs' file, or a copy in the dtypes that the model takes where the plan changed those."""
    stored = bench.proof / INPUTS_FILE
    wanted = {spec.name: spec.dtype for spec in inputs}
    first = bench.golden.samples[0].inputs if bench.golden.samples else {}
    if all(array.dtype.name == wanted.get(name, array.dtype.name) for name, array in first.items()):
        return stored
    arrays, metadata = load_tensors(stored)
    cast = {key: array.astype(numpy_dtype(wanted[key.partition("/")[2]]), copy=False) for key, array in arrays.items()}
    path = bench.work / f"inputs-{'-'.join(sorted(set(wanted.values())))}.safetensors"
    save_tensors(path, cast, metadata)
    return path


def _dtypes(outputs: tuple[TensorSpec, ...], bench: Bench) -> Mapping[str, str]:
    first = bench.golden.samples[0].outputs if bench.golden.samples else {}
    return {
        spec.name: spec.dtype for spec in outputs if spec.name in first and first[spec.name].dtype.name != spec.dtype
    }
