"""Many ONNX models, one after the other, in one child process with onnxruntime: what an audit or a search runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtforge.runtime.child import ChildCrashError, Emit, run_child
from trtforge.runtime.errors import TrtForgeError
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.tensors import group_samples, load_tensors, save_tensors

__all__ = ["BatchRun", "run_many", "run_many_task"]


@dataclass(frozen=True, slots=True)
class BatchRun:
    """What became of one model.

    Attributes:
        model: The `.onnx` file.
        outputs: By the name of a set of feeds: safetensors with keys `<sample>/<output>`; a set that failed is absent.
        errors: By the name of a set: why it failed; all sets where the model did not load or ended the child.
    """

    model: Path
    outputs: Mapping[str, Path]
    errors: Mapping[str, str]


def run_many(
    models: Sequence[Path], feeds: Mapping[str, Path], folder: Path, *, threads: int | None = None
) -> list[BatchRun]:
    """Runs every model on every set of feeds; a model that fails, or ends the child, does not take the others along.

    Q/DQ pairs stay as they are written (`disable_quant_qdq`).

    Args:
        models: `.onnx` files with different stems.
        feeds: Safetensors with keys `<sample>/<input>`, by the name of the set.
        folder: Where outputs go, `<stem>.<set>.safetensors`.
        threads: Threads inside one operator; None leaves it to onnxruntime.

    Returns:
        One for each model, in order.
    """
    done: list[BatchRun] = []

    def take(event: dict[str, Any]) -> None:
        if event.get("event") == "model":
            outputs = {name: Path(path) for name, path in event["outputs"].items()}
            done.append(BatchRun(Path(event["model"]), outputs, event["errors"]))

    while len(done) < len(models):
        args = {
            "models": [str(path) for path in models[len(done) :]],
            "feeds": {name: str(path) for name, path in feeds.items()},
            "folder": str(folder),
            "threads": threads,
        }
        try:
            run_child("onnx.run_many", args, on_event=take)
        except ChildCrashError as error:
            done.append(BatchRun(models[len(done)], {}, dict.fromkeys(feeds, error.what)))
    return done


def run_many_task(args: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """The child's end of `run_many`."""
    sets = {name: group_samples(load_tensors(Path(path))[0]) for name, path in args["feeds"].items()}
    for text in args["models"]:
        model = Path(text)
        outputs: dict[str, str] = {}
        errors: dict[str, str] = {}
        try:
            runner = OnnxRuntimeRunner(model, disable_quant_qdq=True, threads=args["threads"])
        except TrtForgeError as error:
            errors = dict.fromkeys(sets, str(error))
            sets_to_run = {}
        else:
            sets_to_run = sets
        for name, samples in sets_to_run.items():
            path = Path(args["folder"]) / f"{model.stem}.{name}.safetensors"
            try:
                found = {
                    f"{sample}/{output}": array
                    for sample, inputs in samples.items()
                    for output, array in runner.run(inputs).items()
                }
            except TrtForgeError as error:
                errors[name] = str(error)
                continue
            save_tensors(path, found)
            outputs[name] = str(path)
        emit("model", model=text, outputs=outputs, errors=errors)
    return {"models": len(args["models"])}
