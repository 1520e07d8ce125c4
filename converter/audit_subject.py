"""What an audit changes and runs: an artifact's graphs, the held-out set, and how its own proof judges a change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from trtforge.converter.artifact import Artifact
from trtforge.converter.faults import Scene
from trtforge.converter.graph_edits import FLOATS, GraphEditor
from trtforge.converter.reporting import read_report
from trtforge.runtime.errors import ParityError, TrtForgeError
from trtforge.runtime.graph import dtype_name, graph_hash, load_graph
from trtforge.runtime.inputs import numpy_dtype
from trtforge.runtime.onnx_batch import BatchRun, run_many
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.runner import Array, Tensors
from trtforge.runtime.tensors import save_tensors
from trtforge.validation.audit import Judge, Outcome
from trtforge.validation.golden import EXTREME, GoldenSet, SamplePoint, load_outputs, record
from trtforge.validation.parity import Candidate, Stage
from trtforge.validation.polygraphy_data import default_inputs, passes_by_default
from trtforge.validation.tolerance import Tolerance

__all__ = ["Judged", "Subject", "make_subjects", "record_held_out"]

_HELD_OUT_BYTES = 64 << 20
_TENSORS = 48
"""Of so many tensors peaks are measured, for faults on rare inputs."""


def record_held_out(
    artifact: Artifact, golden: GoldenSet, *, repeats: int, seed: int, data: object | None
) -> GoldenSet:
    """Inputs that the golden set lacks, and the float graph's outputs, which the export's proof tied to PyTorch's.

    Args:
        artifact: Its inputs and profiles say what is generated; nothing extreme: faults are judged by the usual.
        golden: Its generated samples are repeated in their sizes, with other seeds.
        repeats: How often; sizes between min and max come beside.
        seed: Decides those sizes.
        data: Further batches, as `calibration.loaders.read_batches` reads them; None without.
    """
    points = []
    for repeat in range(repeats):
        for index, sample in enumerate(golden.samples):
            if sample.seed is not None and not sample.name.endswith(EXTREME):
                number = 1_000_003 * (repeat + 1) + index
                points.append(SamplePoint(f"{sample.name}-held-{repeat}", sample.sizes, number, required=repeat == 0))
    random = np.random.default_rng([seed, 1])
    for number, profile in enumerate(artifact.profiles):
        if any(dim.min < dim.max for dim in profile.values()):
            for repeat in range(4):
                sizes = {name: int(random.integers(dim.min, dim.max + 1)) for name, dim in profile.items()}
                points.append(SamplePoint(f"between-{number}-{repeat}", sizes, 2_000_003 + repeat, required=False))
    runner = OnnxRuntimeRunner(artifact.reference, disable_quant_qdq=True)
    real: Iterator[Tensors] | tuple[()] = ()
    if data is not None:
        from trtforge.calibration.loaders import read_batches

        real = read_batches(data, artifact.inputs, artifact.profiles)
    return record(runner, artifact.inputs, points, real=real, byte_limit=_HELD_OUT_BYTES)


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdicts on one changed model; see `validation.audit.Trial`."""

    proof: Outcome
    held_out: Outcome
    reason: str
    polygraphy: bool
    polygraphy_own: bool | None


@dataclass(frozen=True, slots=True)
class Subject:
    """One graph under audit, and how its proof judges it."""

    path: Path
    stage: Stage
    judge: Judge
    half: bool
    scene: Scene
    work: Path
    feeds: Mapping[str, Path]
    own_reference: Mapping[str, Array] | None
    seen: set[str] = field(default_factory=set)

    def check_unchanged(self) -> None:
        """Raises `ParityError` where the unchanged model does not pass both sets: then nothing can be told."""
        made = self._write(load_graph(self.path), "unchanged")
        if made is None:
            raise ParityError(f"{self.path} is not valid ONNX")
        (run,) = run_many([made], self.feeds, self.work)
        for held_out, name in ((False, "golden"), (True, "held_out")):
            outcome, reason = self._outcome(run, name, held_out=held_out)
            if outcome in ("failed", "error"):
                raise ParityError(
                    f"the unchanged {self.path.name} exceeds the budget on the {name.replace('_', '-')} set",
                    why=reason,
                    fix="prove the artifact again on more inputs: what it was proved on does not stand for these",
                )

    def make(self, name: str, change: Callable[[GraphEditor], str | None]) -> tuple[Path, str] | None:
        """A changed model, valid and unlike all before; None where the change did not apply."""
        graph = load_graph(self.path)
        what = change(GraphEditor(graph))
        if what is None:
            return None
        digest = graph_hash(graph)
        if what != "names" and digest in self.seen:
            return None
        self.seen.add(digest)
        path = self._write(graph, name)
        return None if path is None else (path, what)

    def judged(self, run: BatchRun) -> Judged | None:
        """The verdicts, of which None means that the model does not run at all. Its files are deleted."""
        if "first" in run.errors:
            return None
        proof, _ = self._outcome(run, "golden", held_out=False)
        held_out, reason = self._outcome(run, "held_out", held_out=True)
        golden = self.judge.golden.samples
        refused = True
        if "golden" in run.outputs:
            outputs = load_outputs(run.outputs["golden"])
            refused = not passes_by_default([s.outputs for s in golden], [outputs[s.name] for s in golden])
        own: bool | None = None
        if self.own_reference is not None:
            own = True
            if "own" in run.outputs:
                found = load_outputs(run.outputs["own"])["own"]
                own = not passes_by_default([self.own_reference], [found])
        for path in run.outputs.values():
            path.unlink()
        run.model.unlink()
        return Judged(proof, held_out, reason, refused, own)

    def _outcome(self, run: BatchRun, name: str, *, held_out: bool) -> tuple[Outcome, str]:
        if name not in run.outputs:
            return "error", run.errors.get(name, "it did not run")
        return self.judge.verdict(load_outputs(run.outputs[name]), held_out=held_out)

    def _write(self, graph: ir.Model, name: str) -> Path | None:
        path = self.work / f"{self.stage}-{name}.onnx"
        try:
            ir.save(graph, path)
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, TypeError):
            path.unlink(missing_ok=True)
            return None  # no valid ONNX, so no fault that a tool could have made
        if self.half:
            from trtforge.validation.emulate import emulate

            ir.save(emulate(load_graph(path)), path)
        return path


def make_subjects(artifact: Artifact, golden: GoldenSet, held_out: GoldenSet, work: Path) -> list[Subject]:
    """The float graph, and the one with the plan where it is another."""
    proof = read_report(artifact.path).proof
    scene = _scene(artifact, held_out)
    own = _own_reference(OnnxRuntimeRunner(artifact.reference, disable_quant_qdq=True))
    paths: list[tuple[Stage, Path]] = [("export", artifact.reference)]
    if artifact.model != artifact.reference:
        paths.append(("precision", artifact.model))
    found = []
    for stage, path in paths:
        report = proof.stage(stage)
        if report is None:  # the engine's report stands for it
            tolerance = Tolerance.from_json(artifact.facts["tolerance"])
            candidate = Candidate(stage, "onnxruntime", "", artifact.facts["precision"], {})
        else:
            tolerance, candidate = report.tolerance, report.candidate
        graph = load_graph(path).graph
        kinds = {str(value.name): dtype_name(value.dtype) for value in (*graph.inputs, *graph.outputs)}
        first = golden.samples[0]
        sets: dict[str, dict[str, Tensors]] = {
            "first": {first.name: first.inputs},
            "golden": {sample.name: sample.inputs for sample in golden.samples},
            "held_out": {sample.name: sample.inputs for sample in held_out.samples},
            **({"own": {"own": own[0]}} if own else {}),
        }
        feeds = {name: _save(work / f"{stage}-{name}.safetensors", samples, kinds) for name, samples in sets.items()}
        dtypes = {name: kinds[name] for name, array in first.outputs.items() if array.dtype.name != kinds.get(name)}
        found.append(
            Subject(
                path=path,
                stage=stage,
                judge=Judge(golden, held_out, tolerance, candidate, dtypes),
                half=stage == "precision" and bool({"fp16", "bf16"} & set(artifact.facts["used_precisions"])),
                scene=scene,
                work=work,
                feeds=feeds,
                own_reference=own and own[1],
            )
        )
    return found


def _scene(artifact: Artifact, held_out: GoldenSet) -> Scene:
    opts: dict[str, int] = {}
    maxima: dict[str, int] = {}
    for profile in artifact.profiles:
        for name, dim in profile.items():
            opts.setdefault(name, dim.opt)
            maxima[name] = max(dim.max, maxima.get(name, 0))
    names = [
        str(value.name)
        for node in load_graph(artifact.reference).graph
        for value in node.outputs
        if value.dtype in FLOATS and value.name
    ][:_TENSORS]
    runner = OnnxRuntimeRunner(artifact.reference, disable_quant_qdq=True, extra_outputs=names)
    rows: dict[str, list[Array]] = {}
    for sample in held_out.samples:
        for name, array in runner.run(sample.inputs).items():
            if name in names and array.size:
                flat = array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)
                rows.setdefault(name, []).append(flat.max(axis=1))
    return Scene(opts, maxima, {name: np.sort(np.concatenate(parts))[::-1] for name, parts in rows.items()})


def _own_reference(runner: OnnxRuntimeRunner) -> tuple[dict[str, Array], dict[str, Array]] | None:
    """Polygraphy's own inputs and the float graph's outputs; None where the model does not take those inputs."""
    try:
        feeds = default_inputs(runner.inputs)
        return feeds, runner.run(feeds)
    except TrtForgeError:
        return None


def _save(path: Path, samples: Mapping[str, Tensors], kinds: Mapping[str, str]) -> Path:
    arrays: dict[str, Array] = {}
    for sample, tensors in samples.items():
        for name, array in tensors.items():
            wanted = kinds.get(name, array.dtype.name)
            arrays[f"{sample}/{name}"] = array if wanted == array.dtype.name else array.astype(numpy_dtype(wanted))
    save_tensors(path, arrays)
    return path
