"""A native crash of the command itself: its watcher says what happened, sweeps, and gives the exit code."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
from fault_tools import convert, made, no_orphans, standing, tree
from tiny_models import descendants, entry, is_gone, run, start, wait_for, write_tiny

__all__ = ["made", "standing"]  # pytest finds fixtures by their names here

# onnxruntime 1.32 divides int64 by idiv, which traps on -2^63 / -1. Generated inputs have no such pair, `divisors` has.
DIVIDES = """<ir_version: 8, opset_import: ["" : 18]>
g (float[n,4] x, int64[n,4] a, int64[n,4] b) => (float[n,4] y) <float[4,4] w = {1,2,3,4,0.5,6,7,8,9,1,1,2,3,4,5,6}> {
  q = Div(a, b)
  f = Cast<to = 1>(q)
  s = Add(x, f)
  h = MatMul(s, w)
  y = Tanh(h)
}"""
DIVISORS = """
import numpy
def bad(dividend=-2**63):
    random = numpy.random.default_rng(0)
    for _ in range(4):
        x = random.normal(size=(2, 4)).astype("float32")
        yield {"x": x, "a": numpy.full((2, 4), dividend), "b": numpy.full((2, 4), -1)}
def good():
    return list(bad(-2))
"""


@pytest.fixture
def dividing(standing: Path) -> Path:
    """The older artifact, and a model that crashes onnxruntime on the batches of `divisors:bad`."""
    onnx.save(onnx.parser.parse_model(DIVIDES), standing / "divides.onnx")
    (standing / "divisors.py").write_text(DIVISORS)
    (standing / "temporary").mkdir()
    return standing


def divides(**more: Any) -> dict[str, Any]:
    inputs = {"x": {"shape": ["n", 4]}}
    inputs |= {name: {"dtype": "int64", "shape": ["n", 4], "values": [1, 9]} for name in "ab"}
    return entry(source={"onnx": "divides.onnx"}, inputs=inputs, **more)


def left(folder: Path) -> list[str]:
    """Temporary files of ours; onnxruntime writes some of its own."""
    return [name for name in os.listdir(folder / "temporary") if name.startswith("trtforge")]


def temporary(folder: Path) -> dict[str, str]:
    return {"TMPDIR": str(folder / "temporary")}


@pytest.mark.parametrize("stage", ["calibrate", "record"])
def test_a_crash_of_onnxruntime_in_a_conversion_alone(dividing: Path, stage: str) -> None:
    bad = {"loader": "divisors:bad"}
    more = {"precision": "int8", "calibration": bad} if stage == "calibrate" else {"validation": bad}
    write_tiny(dividing, {"tiny": divides(**more)})
    before = tree(dividing / "artifacts" / "tiny")
    done = convert(dividing, env=temporary(dividing))
    if done.returncode == 0:
        pytest.skip("this onnxruntime does not crash on -2^63 / -1")
    assert done.returncode == 3, done.stderr
    assert f"error in tiny [{stage}]: the process that converts tiny was ended by SIGFPE" in done.stderr
    assert "in run_with_ort_values" in done.stderr
    assert "fix: try another release of onnxruntime" in done.stderr
    assert "tiny: export: " in done.stderr
    assert "Traceback" not in done.stderr
    assert f"failed ({stage})" in done.stdout
    assert tree(dividing / "artifacts" / "tiny") == before
    assert os.listdir(dividing / "artifacts") == ["tiny"]
    assert left(dividing) == []
    answer = convert(dividing, "--json")
    assert answer.returncode == 3
    model = json.loads(answer.stdout)["models"]["tiny"]
    assert (model["status"], model["error"]["type"], model["error"]["stage"]) == ("failed", "ChildCrashError", stage)


def test_a_crash_of_onnxruntime_in_a_batch_is_told_once(dividing: Path) -> None:
    write_tiny(dividing, {"tiny": divides(validation={"loader": "divisors:bad"}), "other": entry()})
    before = tree(dividing / "artifacts" / "tiny")
    done = convert(dividing)
    if "other" in os.listdir(dividing / "artifacts") and done.returncode == 0:
        pytest.skip("this onnxruntime does not crash on -2^63 / -1")
    assert done.returncode == 3, done.stderr
    assert done.stderr.count("error in tiny [record]: the process that converts tiny was ended by SIGFPE") == 1
    assert "in run_with_ort_values" in done.stderr
    assert tree(dividing / "artifacts" / "tiny") == before
    assert sorted(os.listdir(dividing / "artifacts")) == ["index.html", "other", "tiny"]


@pytest.mark.parametrize("stage", ["calibrate", pytest.param("sensitivity", marks=pytest.mark.slow)])
def test_a_crash_of_onnxruntime_in_trtforge_calibrate(dividing: Path, stage: str) -> None:
    def calibrate(loader: str, *args: str) -> subprocess.CompletedProcess[str]:
        write_tiny(dividing, {"tiny": divides(precision="int8", calibration={"loader": loader})})
        with no_orphans() as env:
            return run(dividing, "calibrate", "tiny.yaml", *args, env=env | temporary(dividing))

    shard = ("--shard", "1/1") if stage == "sensitivity" else ()
    made = calibrate("divisors:good", "-o", "ranges.json", *shard)
    assert made.returncode == 0, made.stderr
    ranges = (dividing / "ranges.json").read_bytes()
    if stage == "sensitivity":  # what is merged runs no data, and layers are measured on this loader's
        done = calibrate("divisors:bad", "-o", "merged.json", "--merge", "ranges.json", "--sensitivity", "1")
    else:
        done = calibrate("divisors:bad", "-o", "ranges.json")
    if done.returncode == 0:
        pytest.skip("this onnxruntime does not crash on -2^63 / -1")
    assert done.returncode == 3, done.stderr
    assert f"error in tiny [{stage}]: the process of `trtforge calibrate` was ended by SIGFPE" in done.stderr
    assert "fix: " in done.stderr
    assert (dividing / "ranges.json").read_bytes() == ranges
    assert not [name for name in os.listdir(dividing) if name.startswith(".")]
    assert left(dividing) == []


WAITING = """
import os, pathlib, tempfile, time
def slow():
    pathlib.Path("pid").write_text(str(os.getpid()))
    time.sleep(60)
def asks():
    print(input("go on? "))
    import numpy
    return [numpy.ones((2, 4), "float32")]
"""


def waiting(folder: Path, function: str) -> None:
    (folder / "waiting_data.py").write_text(WAITING)
    write_tiny(folder, {"tiny": entry(validation={"loader": f"waiting_data:{function}"})})


def worker(folder: Path) -> int:
    return int(wait_for(lambda: (folder / "pid").exists() and (folder / "pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_to_the_command_stops_the_work(standing: Path, number: signal.Signals) -> None:
    waiting(standing, "slow")
    before = tree(standing / "artifacts" / "tiny")
    with start(standing, "convert", "tiny.yaml") as command:
        pid = worker(standing)
        assert pid in descendants(command.pid)
        command.send_signal(number)
        _, err = command.communicate(timeout=30)
    assert command.returncode == 128 + number
    assert err.count(f"stopped by {number.name}; what was not finished left nothing") == 1
    assert "Traceback" not in err
    assert is_gone(pid)
    assert tree(standing / "artifacts" / "tiny") == before
    assert os.listdir(standing / "artifacts") == ["tiny"]


def press_ctrl_c(folder: Path, *command: str) -> tuple[int, str]:
    """The exit code and all output of a command on a terminal of its own, interrupted once it has written `pid`."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(["setsid", "--ctty", *command], cwd=folder, stdin=end, stdout=end, stderr=end)
    os.close(end)
    worker(folder)
    os.write(terminal, b"\x03")
    text = b""
    with contextlib.suppress(OSError):  # once nobody else has it open
        while block := os.read(terminal, 4096):
            text += block
    os.close(terminal)
    return process.wait(30), text.decode()


def test_ctrl_c_on_a_terminal_stops_the_work_once(standing: Path) -> None:
    waiting(standing, "slow")
    code, text = press_ctrl_c(standing, sys.executable, "-m", "trtforge", "convert", "tiny.yaml")
    assert code == 130, text
    assert text.count("stopped by SIGINT") == 1
    assert "Traceback" not in text
    assert is_gone(worker(standing))
    assert os.listdir(standing / "artifacts") == ["tiny"]


COUNTS = """
import os, pathlib, signal, time
from trtforge.runtime.watch import keep_watch
keep_watch(lambda crash: 9)
signal.signal(signal.SIGINT, lambda number, frame: print("one", flush=True))
pathlib.Path("pid").write_text(str(os.getpid()))
end = time.monotonic() + 1
while time.monotonic() < end:
    time.sleep(0.01)
"""


def test_ctrl_c_on_a_terminal_comes_once(tmp_path: Path) -> None:
    """The whole group has it from the terminal: a second one would hit the worker while it cleans up."""
    code, text = press_ctrl_c(tmp_path, sys.executable, "-c", COUNTS)
    assert code == 0
    assert text.split() == ["^C", "one"] or text.split() == ["^Cone"]


@pytest.mark.parametrize("killed", ["worker", "watcher"])
def test_sigkill_of_either_process(standing: Path, killed: str) -> None:
    waiting(standing, "slow")
    before = tree(standing / "artifacts" / "tiny")
    with start(standing, "convert", "tiny.yaml") as command:
        pid = worker(standing)
        os.kill(pid if killed == "worker" else command.pid, signal.SIGKILL)
        _, err = command.communicate(timeout=30)
    if killed == "worker":
        assert command.returncode == 3
        assert "error in tiny [record]: the process that converts tiny was ended by SIGKILL" in err
        assert "fix: free memory" in err
    else:
        assert command.returncode == -signal.SIGKILL
        assert "stopped by SIGTERM" in err
    wait_for(lambda: is_gone(pid), 20)
    assert tree(standing / "artifacts" / "tiny") == before
    assert os.listdir(standing / "artifacts") == ["tiny"]


def test_the_user_s_code_reads_the_command_s_input(standing: Path) -> None:
    waiting(standing, "asks")
    with start(standing, "convert", "tiny.yaml", stdin=subprocess.PIPE) as command:
        _, err = command.communicate("yes, go on\n", timeout=120)
    assert command.returncode == 0, err
    assert "yes, go on" in err


CRASHES = """
import os, sys
from trtforge.converter.crash import tell_crash
from trtforge.runtime.publish import scratch_folder
from trtforge.runtime.watch import keep_watch
import ctypes, threading
keep_watch(tell_crash)
with scratch_folder() as folder:
    (folder / "file").write_text("large")
    if sys.argv[1] == "exit":
        sys.exit(7)
    if sys.argv[1] == "abort":
        os.abort()
    libc = ctypes.CDLL(None)
    thread = ctypes.c_ulong()
    libc.pthread_create(ctypes.byref(thread), None, libc.abort, None)
    threading.Event().wait()
"""


@pytest.mark.parametrize(("way", "code"), [("exit", 7), ("abort", 3), ("native thread", 3)])
def test_temporary_folders_go_with_the_worker(tmp_path: Path, way: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, way], env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert os.listdir(tmp_path) == []
    if code == 3:
        assert "was ended by SIGABRT" in done.stderr
        assert "native code crashed, called from\n" in done.stderr
