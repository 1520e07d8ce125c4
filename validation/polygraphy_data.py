"""Golden sets in Polygraphy's formats, and the `polygraphy run` line that reproduces a comparison without trtforge.

Polygraphy brings runners, heat maps and bisection (`polygraphy debug`). The verdict stays ours: its comparisons pass
for no data, for missing and extra outputs and for other dtypes, and know neither pooled nor vacuous results.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trtforge.runtime.errors import ArtifactError, MissingDependencyError
from trtforge.runtime.inputs import numpy_dtype
from trtforge.runtime.runner import Array, Tensors
from trtforge.runtime.specs import TensorSpec
from trtforge.validation.golden import GoldenSet
from trtforge.validation.parity import ParityReport

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "CANDIDATE_FILE",
    "INPUTS_FILE",
    "REFERENCE_FILE",
    "default_inputs",
    "export_polygraphy",
    "load_run_results",
    "passes_by_default",
    "polygraphy_command",
]

INPUTS_FILE = "inputs.json"
REFERENCE_FILE = "reference.json"
CANDIDATE_FILE = "candidate.json"


def export_polygraphy(
    golden: GoldenSet,
    folder: Path,
    outputs: Mapping[str, Tensors] | None = None,
    *,
    runner: str = "candidate",
    samples: Sequence[str] | None = None,
) -> tuple[Path, ...]:
    """Writes `inputs.json` (for `--load-inputs`), `reference.json` and `candidate.json` (for `--load-outputs`).

    One iteration is one sample. bfloat16 becomes float32, since Polygraphy's arrays are numpy's own.

    Args:
        golden: The reference.
        folder: Made where it is missing; files of these names are replaced.
        outputs: The candidate's outputs by sample and output name; without, there is no `candidate.json`.
        runner: What Polygraphy is to call the candidate.
        samples: Names of the samples to write; None for all.

    Returns:
        The files.

    Raises:
        ArtifactError: `folder` cannot be written.
        MissingDependencyError: Polygraphy is not installed.
    """
    json, comparator = _import("polygraphy.json"), _import("polygraphy.comparator")
    chosen = [s for s in golden.samples if samples is None or s.name in samples]
    texts = {
        INPUTS_FILE: json.to_json([_plain(s.inputs) for s in chosen]),
        REFERENCE_FILE: _run_results(comparator, golden.runner, [s.outputs for s in chosen]).to_json(),
    }
    if outputs is not None:
        found = [outputs.get(s.name, {}) for s in chosen]
        texts[CANDIDATE_FILE] = _run_results(comparator, runner, found).to_json()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(
            f"cannot write into {folder}: {error.strerror or error}",
            fix="free space or give permission there, or choose another --output",
        ) from error
    return tuple(folder / name for name in texts)


def passes_by_default(reference: Sequence[Tensors], candidate: Sequence[Tensors]) -> bool:
    """Whether Polygraphy's default comparison (`SimpleCompareFunc()`: elementwise, atol and rtol 1e-5) accepts.

    Args:
        reference: Outputs by name, one mapping an iteration.
        candidate: The same of what is compared.

    Raises:
        MissingDependencyError: Polygraphy is not installed.
    """
    comparator = _import("polygraphy.comparator")
    logger = _import("polygraphy.logger")
    results = _run_results(comparator, "reference", reference)
    results.add([_plain(sample) for sample in candidate], runner_name="candidate")
    # Its statistics of NaN and Inf warn.
    with logger.G_LOGGER.verbosity(logger.G_LOGGER.CRITICAL), np.errstate(all="ignore"):
        # Fail fast: the same verdict, and its report of every iteration costs a hundred times the comparison.
        found = comparator.Comparator.compare_accuracy(
            results, fail_fast=True, compare_func=comparator.SimpleCompareFunc()
        )
    return bool(found)


def default_inputs(inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    """What Polygraphy feeds a model by default: one iteration, values from 0 to 1, dynamic dimensions of size 1.

    Raises:
        MissingDependencyError: Polygraphy is not installed.
    """
    comparator, common = _import("polygraphy.comparator"), _import("polygraphy.common")
    logger = _import("polygraphy.logger")
    metadata = common.TensorMetadata()
    for spec in inputs:
        kind = np.float32 if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
        metadata.add(spec.name, kind, tuple(-1 if isinstance(dim, str) else dim for dim in spec.shape))
    with logger.G_LOGGER.verbosity(logger.G_LOGGER.CRITICAL):
        made = comparator.DataLoader(input_metadata=metadata)[0]
    return {spec.name: np.asarray(made[spec.name]).astype(numpy_dtype(spec.dtype)) for spec in inputs}


def load_run_results(path: Path) -> dict[str, list[dict[str, Array]]]:
    """Outputs by runner, one mapping an iteration, from a file of `polygraphy run --save-outputs`.

    Raises:
        ArtifactError: the file is missing, or holds no run results.
        MissingDependencyError: Polygraphy is not installed.
    """
    json, comparator = _import("polygraphy.json"), _import("polygraphy.comparator")
    polygraphy_error = _import("polygraphy.exception").PolygraphyException
    try:
        found = json.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, polygraphy_error) as error:
        raise ArtifactError(f"cannot read Polygraphy's results from {path}: {error}") from error
    if not isinstance(found, comparator.RunResults):
        raise ArtifactError(
            f"{path} holds no run results of Polygraphy", fix="write it with `polygraphy run … --save-outputs`"
        )
    return {name: [dict(iteration.items()) for iteration in iterations] for name, iterations in found.items()}


def polygraphy_command(report: ParityReport, data: str, *, model: str | None = None, backend: str = "") -> str:
    """A shell line that makes the same comparison with Polygraphy 0.53, sample by sample.

    It checks SQNR and cosine, the greatest absolute error of each output, or atol and rtol where those are asked. It
    exits with 1 where a sample fails. Where only figures over all samples failed it may pass; and it says nothing about
    vacuous results.

    Args:
        report: What to reproduce.
        data: The folder of `export_polygraphy`, as the line is to name it.
        model: The `.onnx` or `.engine` file to run again; None compares the recorded outputs, which needs neither
            GPU nor model.
        backend: "tensorrt-rtx" where an engine is RTX's.
    """
    words = ["polygraphy", "run"]
    golden = f"{data}/{REFERENCE_FILE}"
    if model is None:
        words += ["--load-outputs", f"{data}/{CANDIDATE_FILE}", golden]
    else:
        engine = report.candidate.stage == "engine"
        words += [model, "--model-type", "engine", "--trt"] if engine else [model, "--onnxrt"]
        words += ["--load-inputs", f"{data}/{INPUTS_FILE}", "--load-outputs", golden]
    words += ["--validate", *_limits(report)]
    line = shlex.join(words)
    return f"POLYGRAPHY_USE_TENSORRT_RTX=1 {line}" if model is not None and backend == "tensorrt-rtx" else line


def _limits(report: ParityReport) -> list[str]:
    tolerance = report.tolerance
    functions, words = [], []
    # Polygraphy 0.53.6 subtracts bool arrays for SNR, which numpy refuses.
    boolean = any(output.dtype == "bool" for output in report.outputs)
    if tolerance.sqnr_db is not None and not boolean:
        functions.append("snr")
        words += ["--snr-threshold", f"{tolerance.sqnr_db:g}"]
    if tolerance.cosine is not None and not boolean:
        functions.append("cosine_similarity")
        words += ["--cosine-similarity-threshold", f"{tolerance.cosine:g}"]
    if tolerance.elementwise:
        functions.append("simple")
        words += ["--atol", f"{tolerance.atol or 0:g}", "--rtol", f"{tolerance.rtol or 0:g}"]
    elif limits := _greatest_errors(report):
        functions.append("simple")
        # An output passes within atol or within rtol: rtol 0 leaves it to atol.
        words += ["--check-error-stat", "max", "--rtol", "0", "--atol", *limits]
    return ["--compare", *functions, *words] if functions else []


def _greatest_errors(report: ParityReport) -> list[str]:
    limit = report.tolerance.max_abs_over_std
    return [
        f"{output.name}:{0 if limit is None or 'float' not in output.dtype else output.pooled.std * limit:.6g}"
        for output in report.outputs
        if output.pooled is not None and (limit is not None or "float" not in output.dtype)
    ]


def _run_results(comparator: ModuleType, runner: str, outputs: Sequence[Tensors]) -> Any:
    results = comparator.RunResults()
    results.add([_plain(sample) for sample in outputs], runner_name=runner)
    return results


def _plain(tensors: Tensors) -> dict[str, Array]:
    return {
        name: array.astype(np.float32) if array.dtype.name == "bfloat16" else array for name, array in tensors.items()
    }


def _import(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"{name} cannot be imported: {error}", fix="pip install polygraphy") from error
