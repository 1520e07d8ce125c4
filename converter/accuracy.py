"""The accuracy budget within a conversion: recorded samples, run by every candidate and judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtforge.converter.accuracy_tally import Tally
from trtforge.converter.config import Accuracy
from trtforge.converter.progress import Event, Stages
from trtforge.converter.prove import runnable_onnx
from trtforge.runtime.child import ChildCrashError
from trtforge.runtime.errors import AccuracyError
from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.inputs import numpy_dtype
from trtforge.runtime.onnx_runner import run_onnx
from trtforge.runtime.precision import Precision
from trtforge.runtime.runner import Tensors
from trtforge.runtime.specs import InputSpec, TensorSpec
from trtforge.runtime.tensors import group_samples, load_tensors, save_tensors
from trtforge.validation.accuracy import AccuracyReport, AccuracyResult, Budget, judge
from trtforge.validation.accuracy_interval import RESAMPLES
from trtforge.validation.accuracy_metrics import Metric, Scores
from trtforge.validation.golden import GoldenSet, Sample, sizes_of
from trtforge.validation.metrics import Sums, add_sums, is_float, sum_errors
from trtforge.validation.parity import Stage

__all__ = ["LABELLED", "WORST", "Chunk", "LabelledSet", "Run"]

LABELLED = "accuracy"
"""In a failed artifact: every sample's score, and the samples that suffered most."""
WORST = "worst"
"""Beneath it: the golden set of those samples."""
_WORST = 32
_WORST_BATCHES = 4
_WHOLE_RESAMPLES = 400
"""Where each resample is a call of the user's own function."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some batches on disk: inputs and PyTorch's outputs, with keys `<batch>/<tensor>`; and their labels."""

    inputs: Path
    truth: Path
    labels: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """A candidate's run over the labelled samples: what it scored, how far its output is from PyTorch's."""

    runner: str
    version: str
    scores: Scores
    sums: Sums
    note: str = ""

    @property
    def sqnr_db(self) -> float | None:
        """Over every sample; None where the output is no float."""
        if self.sums.count == 0:
            return None
        return self.sums.measures().sqnr_db if not self.sums.candidate_nonfinite else float("-inf")


@dataclass(frozen=True, slots=True, eq=False)
class LabelledSet:
    """Labelled samples, recorded once so that every candidate sees the same, and PyTorch's scores on them.

    `alone`: a batch of one sample is within a profile.
    """

    accuracy: Accuracy
    budget: Budget
    metric: Metric
    output: str | None
    chunks: tuple[Chunk, ...]
    reference: Scores
    reference_runner: tuple[str, str]
    specs: tuple[InputSpec, ...]
    alone: bool
    work: Path
    stages: Stages

    def report(self) -> AccuracyReport:
        """The budget without results."""
        return AccuracyReport(self.metric.name, self.accuracy.labels, self.budget)

    def run_onnx(self, model: OnnxModel, used: set[Precision], name: str = "accuracy") -> Run:
        """Runs an ONNX model on onnxruntime, in children; half precision is emulated.

        Raises:
            AccuracyError: onnxruntime crashed.
        """
        run, note = runnable_onnx(model, used, self.work / f"{name}-emulated.onnx")

        def execute(feeds: Path, outputs: Path) -> dict[str, Any]:
            try:
                return run_onnx(run.path, feeds, outputs, disable_quant_qdq=True)
            except ChildCrashError as error:
                raise AccuracyError("onnxruntime crashed on the labelled samples", why=error.what) from error

        return self._run(execute, run.inputs, note)

    def run_engine(self, engine: Path, backend: str, inputs: tuple[TensorSpec, ...], *, tf32: bool = False) -> Run:
        """Runs an engine on the GPU, in children. Raises as `prove_engine`."""
        from trtforge.runtime.trt.execute import run_engine

        return self._run(lambda feeds, outputs: run_engine(engine, backend, feeds, outputs, tf32=tf32), inputs, "")

    def judge(self, run: Run, stage: Stage, graph: str, **options: Any) -> AccuracyResult:
        """The verdict on a run; `options` are those of `judge`."""
        if self.metric.whole is not None:
            options = {"resamples": _WHOLE_RESAMPLES, **options}
        else:
            options = {"resamples": RESAMPLES, **options}
        return judge(
            self.reference, run.scores, self.budget, stage=stage, runner=run.runner, version=run.version, graph=graph,
            sqnr_db=run.sqnr_db, note=run.note, **options,
        )  # fmt: skip

    def worst(self, run: Run) -> list[int]:
        """The samples that lost most against PyTorch, or gave NaN, the worst first; none where nothing tells them."""
        if not run.scores.rows.shape[1]:
            return []
        before = self.metric.value(self.reference.rows)
        loss = np.nan_to_num(before) - np.nan_to_num(self.metric.value(run.scores.rows))
        order = np.argsort(-loss, kind="stable")
        return [int(index) for index in order[:_WORST] if loss[index] > 0]

    def batches(self, chosen: Sequence[int], most: int) -> Iterator[Sample]:
        """The first `most` batches that hold some of the samples, by number: as many rows as the loader gave."""
        for number, (start, feeds, truth) in enumerate(self._recorded()):
            if most and any(start <= index < start + _rows(feeds) for index in chosen):
                most -= 1
                yield self._sample(f"labelled-batch-{number}", feeds, truth)

    def worst_set(self, run: Run) -> GoldenSet:
        """The samples that lost most, with PyTorch's outputs: each alone, where a batch of one is allowed."""
        worst = set(self.worst(run))
        found = tuple(self._singles(worst) if self.alone else self.batches(sorted(worst), _WORST_BATCHES))
        return GoldenSet(found, *self.reference_runner)

    def _singles(self, chosen: set[int]) -> Iterator[Sample]:
        for start, feeds, truth in self._recorded():
            for index in sorted(chosen & set(range(start, start + _rows(feeds)))):
                at = slice(index - start, index - start + 1)
                sides = [{name: array[at] for name, array in side.items()} for side in (feeds, truth)]
                yield self._sample(f"labelled-{index}", *sides)

    def _recorded(self) -> Iterator[tuple[int, Tensors, Tensors]]:
        """Each batch: the number of its first sample, its inputs, PyTorch's outputs."""
        start = 0
        for chunk in self.chunks:
            inputs, truth = (group_samples(load_tensors(path)[0]) for path in (chunk.inputs, chunk.truth))
            for name, feeds in inputs.items():
                yield start, feeds, truth[name]
                start += _rows(feeds)

    def _sample(self, name: str, feeds: Tensors, truth: Tensors) -> Sample:
        return Sample(name, sizes_of(self.specs, feeds, name=name), None, feeds, truth)

    def save_failure(self, run: Run, folder: Path) -> None:
        """Writes every sample's score, PyTorch's and the candidate's, and the samples that lost most.

        These are a golden set of their own in `WORST`: `trtforge bisect` finds there what the proof's inputs missed.
        """
        folder.mkdir(exist_ok=True)
        if run.scores.rows.shape[1]:
            rows = {"reference": self.reference.rows, "candidate": run.scores.rows}
            save_tensors(folder / "scores.safetensors", rows, {"metric": self.metric.name})
        worst = self.worst_set(run)
        if worst.samples:
            worst.save(folder / WORST)

    def _run(self, execute: Callable[[Path, Path], dict[str, Any]], inputs: tuple[TensorSpec, ...], note: str) -> Run:
        tally = Tally(self.metric, self.output)
        facts: dict[str, Any] = {}
        sums, total, done = Sums(), self.reference.count, 0
        results = self.work / "accuracy-outputs.safetensors"
        for chunk in self.chunks:
            facts = execute(_cast_feeds(chunk.inputs, inputs, self.work), results)
            found = group_samples(load_tensors(results)[0])
            truth = group_samples(load_tensors(chunk.truth)[0])
            for batch, labels in chunk.labels.items():
                outputs = found[batch]
                done += tally.add(outputs, labels)
                sums = _add(sums, truth[batch], outputs, self.output)
            self.stages.on_event(Event("progress", self.stages.current, "samples", done, total))
        results.unlink(missing_ok=True)
        return Run(facts["runner"], facts["version"], tally.scores(), sums, note)


def _rows(feeds: Tensors) -> int:
    return len(next(iter(feeds.values())))


def _add(sums: Sums, truth: Tensors, outputs: Tensors, output: str | None) -> Sums:
    names = [output] if output is not None else list(truth)
    for name in names:
        if is_float(truth[name]) and outputs[name].shape == truth[name].shape:
            sums = add_sums(sums, sum_errors(truth[name], outputs[name]))
    return sums


def _cast_feeds(feeds: Path, inputs: tuple[TensorSpec, ...], folder: Path) -> Path:
    """The file itself, or a copy in the dtypes that the candidate takes (a plan with `keep_io: false`)."""
    wanted = {spec.name: spec.dtype for spec in inputs}
    arrays, _ = load_tensors(feeds)
    if all(array.dtype.name == wanted[key.partition("/")[2]] for key, array in arrays.items()):
        return feeds
    cast = {key: array.astype(numpy_dtype(wanted[key.partition("/")[2]])) for key, array in arrays.items()}
    place = folder / "accuracy-inputs.safetensors"
    save_tensors(place, cast)
    return place
