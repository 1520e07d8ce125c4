"""The accuracy budget within a conversion: labelled samples, recorded once with PyTorch's answers, run by others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trtforge.converter.config import Accuracy, ConversionConfig
from trtforge.converter.data import find_source
from trtforge.converter.labels import read_labelled
from trtforge.converter.progress import Event, Stages
from trtforge.converter.prove import runnable_onnx
from trtforge.converter.references import UserCodeError, find_reference
from trtforge.runtime.child import ChildCrashError
from trtforge.runtime.errors import AccuracyError, ConfigError, TrtForgeError
from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.inputs import numpy_dtype
from trtforge.runtime.onnx_runner import run_onnx
from trtforge.runtime.precision import Precision
from trtforge.runtime.runner import Array, Runner, Tensors
from trtforge.runtime.specs import InputSpec, Profile, TensorSpec
from trtforge.runtime.suggest import nearest
from trtforge.runtime.tensors import group_samples, load_tensors, save_tensors
from trtforge.validation.accuracy import AccuracyReport, AccuracyResult, Budget, judge
from trtforge.validation.accuracy_interval import RESAMPLES
from trtforge.validation.accuracy_metrics import Metric, Scores, find_metric, user_metric
from trtforge.validation.golden import GoldenSet, Sample, sizes_of
from trtforge.validation.metrics import Sums, add_sums, is_float, sum_errors
from trtforge.validation.parity import Stage

__all__ = ["LABELLED", "WORST", "LabelledSet", "Run", "record_labelled"]

LABELLED = "accuracy"
"""In a failed artifact: every sample's score, and the samples that suffered most."""
_CHUNK_BYTES = 96 << 20
WORST = "worst"
"""Beneath it: the golden set of those samples."""
_WORST = 32
_WORST_BATCHES = 4
_WHOLE_RESAMPLES = 400
"""Where each resample is a call of the user's own function."""


@dataclass(frozen=True, slots=True)
class _Chunk:
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
    chunks: tuple[_Chunk, ...]
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
        tally = _Tally(self.metric, self.output)
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


def record_labelled(
    config: ConversionConfig,
    live: object | None,
    specs: tuple[InputSpec, ...],
    runner: Runner,
    folder: Path,
    stages: Stages,
) -> LabelledSet | None:
    """Reads the accuracy loader once, runs PyTorch on it, and keeps both on disk; None where no budget is given.

    Args:
        config: Its `validation.accuracy` is the budget.
        live: Data from Python.
        specs: The model's inputs.
        runner: PyTorch.
        folder: Where the samples lie meanwhile; its owner deletes it.
        stages: Receives progress.

    Raises:
        ConfigError: there is no data, no labels, or they do not fit the metric.
        UserCodeError: the user's own function raised.
    """
    accuracy = config.validation.accuracy
    if accuracy is None:
        return None
    source = find_source(config, accuracy.loader or config.validation.loader, live)
    if source is None:
        raise ConfigError(
            "the accuracy budget has no data",
            fix="name `validation: {accuracy: {loader: package.module:function}}`, or give `data` from Python",
        )
    folder.mkdir(parents=True, exist_ok=True)
    batches = read_labelled(source, specs, config.profiles, accuracy.batches, wanted=accuracy.labels == "loader")
    recorder = _Recorder(config, accuracy, runner, specs, folder)
    for feeds, labels in batches:
        recorder.add(feeds, labels)
        stages.on_event(Event("progress", stages.current, "labelled samples", recorder.count))
    return recorder.finish(stages)


@dataclass(slots=True)
class _Recorder:
    """Collects batches into chunks; the metric is made with the first batch, since a function's kind shows there."""

    config: ConversionConfig
    accuracy: Accuracy
    runner: Runner
    specs: tuple[InputSpec, ...]
    folder: Path
    count: int = 0
    tally: _Tally | None = None
    output: str | None = None
    chunks: list[_Chunk] = field(default_factory=list)
    inputs: dict[str, Array] = field(default_factory=dict)
    truth: dict[str, Array] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0

    def add(self, feeds: Tensors, labels: Any) -> None:
        outputs = self.runner.run(feeds)
        if self.tally is None:
            self.output = _choose_output(self.accuracy, outputs)
        predictions = _predictions(outputs, self.output)
        metric = self.tally.metric if self.tally else None
        if labels is None:
            metric = metric or self._metric(predictions, predictions)
            labels = metric.target(predictions)
        self.tally = self.tally or _Tally(metric or self._metric(predictions, labels), self.output)
        self.count += self.tally.add(outputs, labels)
        name = f"batch-{len(self.chunks):04}-{len(self.labels):06}"
        self.inputs |= {f"{name}/{key}": array for key, array in feeds.items()}
        self.truth |= {f"{name}/{key}": array for key, array in outputs.items()}
        self.labels[name] = labels
        self.bytes += sum(array.nbytes for array in (*feeds.values(), *outputs.values()))
        if self.bytes >= _CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self.labels:
            return
        number = len(self.chunks)
        chunk = _Chunk(
            self.folder / f"inputs-{number}.safetensors", self.folder / f"truth-{number}.safetensors", self.labels
        )
        save_tensors(chunk.inputs, self.inputs)
        save_tensors(chunk.truth, self.truth)
        self.chunks.append(chunk)
        self.inputs, self.truth, self.labels, self.bytes = {}, {}, {}, 0

    def finish(self, stages: Stages) -> LabelledSet:
        self.flush()
        assert self.tally is not None  # a source without batches has raised
        accuracy = self.accuracy
        budget = Budget(accuracy.max_drop, accuracy.min)
        return LabelledSet(
            accuracy,
            budget,
            self.tally.metric,
            self.output,
            tuple(self.chunks),
            self.tally.scores(),
            (self.runner.name, self.runner.version),
            self.specs,
            _takes_one(self.specs, self.config.profiles),
            self.folder,
            stages,
        )

    def _metric(self, predictions: Any, labels: Any) -> Metric:
        accuracy, folder = self.accuracy, self.config.folder
        metric, decode = accuracy.metric, accuracy.decode
        if isinstance(decode, str):
            decode = find_reference(decode, folder=folder, what="decode")
        if decode is not None:
            decode = _guarded(decode, "decode")
        if callable(metric) or ":" in metric:
            name = metric if isinstance(metric, str) else getattr(metric, "__qualname__", "metric")
            function = find_reference(metric, folder=folder, what="metric") if isinstance(metric, str) else metric
            return user_metric(name, _guarded(function, f"metric {name}"), predictions, labels)
        return find_metric(metric, classes=accuracy.classes, decode=decode)


@dataclass(slots=True)
class _Tally:
    """Rows of the metric, batch by batch; for a function of everything at once, everything."""

    metric: Metric
    output: str | None
    rows: list[Any] = field(default_factory=list)
    predictions: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    not_finite: int = 0

    def add(self, outputs: Tensors, labels: Any) -> int:
        """Takes in one batch and gives how many samples it has."""
        predictions = _predictions(outputs, self.output)
        count = len(labels)
        arrays = list(predictions.values()) if isinstance(predictions, dict) else [predictions]
        for array in arrays:
            if len(array) != count:
                raise ConfigError(
                    f"the output has {len(array)} rows for {count} samples",
                    why=f"its shape is {list(array.shape)}",
                    fix="name the `output` that has one row a sample",
                )
        bad = np.zeros(count, dtype=bool)
        for array in arrays:
            if array.dtype.kind == "f":
                bad |= ~np.isfinite(array.reshape(count, -1)).all(1)
        self.not_finite += int(bad.sum())
        if self.metric.whole is not None:
            self.predictions.append(predictions)
            self.labels.append(labels)
            self.rows.append(np.zeros((count, 0)))
        else:
            self.rows.append(self.metric.rows(predictions, labels))
        return count

    def scores(self) -> Scores:
        """What was scored so far."""
        whole = self.metric.whole is not None
        return Scores(
            self.metric,
            np.concatenate(self.rows),
            _joined(self.predictions) if whole else None,
            _joined(self.labels) if whole else None,
            self.not_finite,
        )


def _takes_one(specs: Sequence[InputSpec], profiles: Sequence[Profile]) -> bool:
    """Whether one sample alone is within a profile: samples lie along the first axis of every input."""
    leading = {spec.shape[0] if spec.shape else 0 for spec in specs}
    return any(all(dim == 1 or (isinstance(dim, str) and p[dim].min <= 1) for dim in leading) for p in profiles)


def _rows(feeds: Tensors) -> int:
    return len(next(iter(feeds.values())))


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in first}
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    return [item for part in parts for item in part]


def _choose_output(accuracy: Accuracy, outputs: Tensors) -> str | None:
    """The output to score; None: all of them, for the user's own function."""
    if accuracy.output is not None:
        if accuracy.output not in outputs:
            raise ConfigError(f"the model has no output {accuracy.output!r}", fix=nearest(accuracy.output, outputs))
        return accuracy.output
    if len(outputs) == 1:
        return next(iter(outputs))
    if callable(accuracy.metric) or ":" in accuracy.metric:
        return None
    raise ConfigError(
        f"metric {accuracy.metric} scores one output, and the model has {', '.join(outputs)}",
        fix="name one: `accuracy: {output: …}`",
    )


def _predictions(outputs: Tensors, output: str | None) -> Any:
    if output is None:
        return {name: _native(array) for name, array in outputs.items()}
    return _native(outputs[output])


def _native(array: Array) -> Array:
    """bfloat16 as float32: numpy's functions don't know it."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _add(sums: Sums, truth: Tensors, outputs: Tensors, output: str | None) -> Sums:
    names = [output] if output is not None else list(truth)
    for name in names:
        if is_float(truth[name]) and outputs[name].shape == truth[name].shape:
            sums = add_sums(sums, sum_errors(truth[name], outputs[name]))
    return sums


def _guarded(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except TrtForgeError:
            raise
        except Exception as error:  # the user's code may raise anything; it is passed on whole as the cause
            raise UserCodeError(
                f"{what} raised {type(error).__name__}: {error}",
                fix="the traceback above is from your code; run it alone to debug it",
            ) from error

    return call


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
