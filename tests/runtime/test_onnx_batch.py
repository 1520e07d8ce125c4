"""Many models in one child: what fails does not take the others along."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser

from trtforge.runtime.onnx_batch import run_many
from trtforge.runtime.tensors import load_tensors, save_tensors


def write(path: Path, op: str, extra: str = "") -> Path:
    text = f'<ir_version: 9, opset_import: ["" : 20]> g (float[n, 4] x) => (float[n, 4] y) {{ y = {op} (x{extra}) }}'
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def feeds(folder: Path) -> dict[str, Path]:
    path = folder / "feeds.safetensors"
    save_tensors(path, {"a/x": np.ones((2, 4), np.float32), "b/x": -np.ones((3, 4), np.float32)})
    return {"set": path}


def test_outputs_and_errors_by_model(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(b"no model")
    models = [write(tmp_path / "neg.onnx", "Neg"), wrong, write(tmp_path / "relu.onnx", "Relu")]
    runs = run_many(models, feeds(tmp_path), tmp_path)
    assert [run.model for run in runs] == models
    assert "cannot load" in runs[1].errors["set"]
    outputs, _ = load_tensors(runs[0].outputs["set"])
    np.testing.assert_array_equal(outputs["a/y"], -np.ones((2, 4)))
    np.testing.assert_array_equal(load_tensors(runs[2].outputs["set"])[0]["b/y"], np.zeros((3, 4)))


def test_a_set_that_fails_leaves_the_others(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_tensors(other, {"a/x": np.ones((2, 5), np.float32)})
    (run,) = run_many([write(tmp_path / "neg.onnx", "Neg")], {**feeds(tmp_path), "other": other}, tmp_path)
    assert set(run.outputs) == {"set"}
    assert set(run.errors) == {"other"}


def test_a_model_that_ends_the_child_is_one_error(tmp_path: Path) -> None:
    fifo = tmp_path / "stuck.onnx"
    os.mkfifo(fifo)  # loading it never ends, until the child is killed
    models = [write(tmp_path / "neg.onnx", "Neg"), fifo, write(tmp_path / "relu.onnx", "Relu")]

    def kill() -> None:
        with fifo.open("wb"):  # opens when the child reads it
            time.sleep(0.1)
            for child in _children(os.getpid()):
                os.kill(child, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    runs = run_many(models, feeds(tmp_path), tmp_path)
    killer.join()
    assert [set(run.outputs) for run in runs] == [{"set"}, set(), {"set"}]
    assert "SIGKILL" in runs[1].errors["set"]


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in tasks for child in path.read_text().split()]
