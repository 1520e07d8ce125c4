"""Labelled samples of a conversion, read once from the user's loader and recorded with PyTorch's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtforge.converter.accuracy import Chunk, LabelledSet
from trtforge.converter.accuracy_tally import Tally, predictions_of
from trtforge.converter.config import Accuracy, ConversionConfig
from trtforge.converter.data import find_source
from trtforge.converter.labels import read_labelled
from trtforge.converter.progress import Event, Stages
from trtforge.converter.references import UserCodeError, find_reference
from trtforge.runtime.errors import ConfigError, TrtForgeError
from trtforge.runtime.runner import Array, Runner, Tensors
from trtforge.runtime.specs import InputSpec, Profile
from trtforge.runtime.suggest import nearest
from trtforge.runtime.tensors import save_tensors
from trtforge.validation.accuracy import Budget
from trtforge.validation.accuracy_metrics import Metric, find_metric, user_metric

__all__ = ["record_labelled"]

_CHUNK_BYTES = 96 << 20


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
    tally: Tally | None = None
    output: str | None = None
    chunks: list[Chunk] = field(default_factory=list)
    inputs: dict[str, Array] = field(default_factory=dict)
    truth: dict[str, Array] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    bytes: int = 0

    def add(self, feeds: Tensors, labels: Any) -> None:
        outputs = self.runner.run(feeds)
        if self.tally is None:
            self.output = _choose_output(self.accuracy, outputs)
        predictions = predictions_of(outputs, self.output)
        metric = self.tally.metric if self.tally else None
        if labels is None:
            metric = metric or self._metric(predictions, predictions)
            labels = metric.target(predictions)
        self.tally = self.tally or Tally(metric or self._metric(predictions, labels), self.output)
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
        chunk = Chunk(
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


def _takes_one(specs: Sequence[InputSpec], profiles: Sequence[Profile]) -> bool:
    """Whether one sample alone is within a profile: samples lie along the first axis of every input."""
    leading = {spec.shape[0] if spec.shape else 0 for spec in specs}
    return any(all(dim == 1 or (isinstance(dim, str) and p[dim].min <= 1) for dim in leading) for p in profiles)


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
