"""Real children: their answers, errors, crashes and ends. Tasks are real; a crash is a real ONNX that crashes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import trt_models as models

from trtforge.runtime import child
from trtforge.runtime.child import ChildCrashError, run_child
from trtforge.runtime.errors import ArtifactError, BuildError, ConfigError
from trtforge.runtime.tensors import load_tensors, save_tensors
from trtforge.runtime.trt.backend import find_backend
from trtforge.runtime.trt.options import BuildOptions

NEGATE = "g (float[n] x) => (float[n] y) { y = Neg(x) }"


def _run_args(folder: Path, **more) -> dict:
    model = models.write(folder, NEGATE)
    save_tensors(folder / "in.safetensors", {"s0/x": np.arange(3, dtype=np.float32)})
    args = {"model": str(model), "feeds": str(folder / "in.safetensors"), "outputs": str(folder / "out.safetensors")}
    return {**args, **more}


def _build_args(path: Path) -> dict:
    return {
        "onnx": str(path), "engine": str(path.with_suffix(".engine")), "backend": "tensorrt-rtx", "profiles": [],
        "tf32": False, "targets": [], "options": BuildOptions().to_json(),
    }  # fmt: skip


def test_a_result_and_events_come_back_from_odd_paths(tmp_path):
    folder = tmp_path / "a b 'c\" ünï 日本\n$HOME"
    folder.mkdir()
    events = []
    answer = run_child("onnx.run", _run_args(folder), on_event=events.append)
    assert answer["samples"] == 1
    assert [event["event"] for event in events] == ["progress"]
    np.testing.assert_array_equal(load_tensors(folder / "out.safetensors")[0]["s0/y"], [0, -1, -2])


def test_undecodable_paths_cross(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    folder.mkdir()
    args = _run_args(folder) | {"model": str(folder / "absent.onnx")}
    with pytest.raises(Exception, match="absent"):
        run_child("onnx.run", args)


def test_a_typed_error_is_revived_with_all_its_parts(tmp_path):
    args = _run_args(tmp_path)
    save_tensors(tmp_path / "in.safetensors", {})
    with pytest.raises(ConfigError, match="holds no tensors") as caught:
        run_child("onnx.run", args)
    assert caught.value.fix.startswith("record at least one sample")
    assert type(caught.value) is ConfigError


def test_what_is_no_error_of_ours_shows_its_traceback(tmp_path):
    with pytest.raises(ChildCrashError, match="exited with code 1") as caught:
        run_child("onnx.run", {})
    assert caught.value.signal == ""
    assert "KeyError: 'feeds'" in caught.value.why


def test_an_unknown_task_is_our_bug():
    with pytest.raises(ValueError, match="unknown task"):
        run_child("nope", {})


@pytest.mark.skipif(not find_backend("tensorrt-rtx").version.startswith("1.7."), reason="only RTX 1.7 crashes on this")
def test_a_native_crash_names_its_signal(tmp_path):
    path = models.write(tmp_path, models.SELF_ATTENTION, opset=23)
    events = []
    with pytest.raises(ChildCrashError, match="was ended by SIGSEGV") as caught:
        run_child("trt.build", _build_args(path), on_event=events.append)
    assert caught.value.signal == "SIGSEGV"
    assert {"event": "doing", "what": "parsing the node m.attn/Attention#0 [Attention]"} in events


def test_what_libraries_print_does_no_harm(tmp_path):
    # TensorRT and onnxruntime print to both streams; here Python itself is made to: -v on each import, 100 kB and more.
    answer = run_child("onnx.run", _run_args(tmp_path), env={"PYTHONVERBOSE": "1"})
    assert answer["samples"] == 1


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_ascii_locales(tmp_path, locale):
    folder = tmp_path / "ünï"
    folder.mkdir()
    env = {"LC_ALL": locale, "LANG": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = (
        "import sys; from pathlib import Path; from trtforge.runtime.child import run_child; f = sys.argv[1]; "
        "print(run_child('onnx.run', {'model': f + '/model.onnx', 'feeds': f + '/in.safetensors', "
        "'outputs': f + '/out.safetensors'})['samples'])"
    )
    _run_args(folder)
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env={**os.environ, **env}, capture_output=True, check=False
    )
    assert done.stdout.strip() == b"1", done.stderr


def test_the_users_folder_does_not_shadow_the_standard_library(tmp_path, monkeypatch):
    for name in ("typing.py", "json.py", "runtime.py", "validation.py"):
        (tmp_path / name).write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert run_child("onnx.run", _run_args(tmp_path))["samples"] == 1


def test_the_entry_of_python_3_10_keeps_the_folder_off_the_path_too(tmp_path, monkeypatch):
    (tmp_path / "typing.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(child.sys, "version_info", (3, 10))
    assert child.module_command("trtforge")[1] == "-c"
    assert run_child("onnx.run", _run_args(tmp_path))["samples"] == 1


def test_a_large_request_crosses(tmp_path):
    assert run_child("onnx.run", _run_args(tmp_path, ignored="x" * 3_000_000))["samples"] == 1


def test_an_error_in_the_callers_callback_stops_the_child(tmp_path):
    def broken(event):
        raise RuntimeError("from the callback")

    with pytest.raises(RuntimeError, match="from the callback"):
        run_child("onnx.run", _run_args(tmp_path), on_event=broken)
    assert not _children(os.getpid())


def test_several_threads_at_once(tmp_path):
    answers = []

    def work(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        answers.append(run_child("onnx.run", _run_args(folder))["samples"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [1, 1, 1]


def test_a_fork_that_holds_the_pipe_does_not_hang_the_parent(tmp_path):
    """Another thread (a DataLoader's) may fork between our opening the pipe and closing its far end."""
    code = f"""
import os, subprocess, sys, time
import trtforge.runtime.child as child
spawn, holders = subprocess.Popen, []
class Popen(spawn):
    def __init__(self, *args, **kwargs):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        holders.append(pid)
        super().__init__(*args, **kwargs)
subprocess.Popen = Popen
try:
    child.run_child("onnx.run", {{}})
except child.ChildCrashError as error:
    print("crash", error.signal)
answer = child.run_child("onnx.run", {_run_args(tmp_path)!r})
print(answer["samples"])
for pid in holders:
    os.kill(pid, 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.split() == ["crash", "1"], done.stderr


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(number) for task in tasks for number in task.read_text().split()]


def _gone(pid: int, seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_the_child_goes_with_its_parent(tmp_path, how):
    """The child waits for a FIFO that nobody writes: only its end ends it."""
    args = _run_args(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # A shell that started the tests in the background has them, and all that they start, ignore SIGINT; nohup, SIGHUP.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        f"from trtforge.runtime.child import run_child; run_child('onnx.run', {args | {'feeds': str(fifo)}!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as parent:
        end = time.monotonic() + 20
        while not (children := _children(parent.pid)) and time.monotonic() < end:
            time.sleep(0.02)
        (pid,) = children
        time.sleep(0.5)
        parent.send_signal(how)
        try:
            _, errors = parent.communicate(timeout=20)
        finally:
            parent.kill()
        assert _gone(pid)
    assert ("KeyboardInterrupt" in errors) is (how == signal.SIGINT)


def test_a_child_that_is_killed_is_a_crash(tmp_path):
    args = _run_args(tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def kill() -> None:
        while not _children(os.getpid()):
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(_children(os.getpid())[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ChildCrashError, match="was ended by SIGKILL") as caught:
        run_child("onnx.run", args | {"feeds": str(fifo)})
    killer.join()
    assert caught.value.signal == "SIGKILL"


@pytest.mark.parametrize("kind", [ArtifactError, BuildError, ConfigError])
def test_revived_errors_are_the_same_class(kind):
    error = child._revive({"type": kind.__name__, "what": "w", "why": "y", "fix": "f"})
    assert (type(error), error.what, error.why, error.fix) == (kind, "w", "y", "f")


def test_an_error_class_that_is_gone_is_still_an_error_of_ours():
    assert child._revive({"type": "OSError", "what": "w"}).exit_code == 1
