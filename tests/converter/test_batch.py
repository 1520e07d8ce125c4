"""Batches: a process a model, several at once, what is unchanged is skipped, and Ctrl-C leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import descendants, entry, is_gone, run, start, wait_for, write_tiny

import trtforge

# Waits in the stage "record", where the staging folder is there; the file named by `mark` says so.
WAITING = """
import os, pathlib, time
def slow(mark):
    pathlib.Path(mark).write_text(str(os.getpid()))
    time.sleep(60)
    return []
def loud():
    print("from Python")
    os.write(1, b"from C\\n")
    import numpy
    return [numpy.ones((2, 4), "float32")]
"""


def slow(mark: str) -> dict[str, object]:
    return entry(validation={"loader": "waiting_data:slow", "kwargs": {"mark": mark}})


def test_goes_on_after_a_failure_skips_what_is_unchanged_and_exits_with_the_worst(tmp_path: Path) -> None:
    (tmp_path / "waiting_data.py").write_text(WAITING)
    loud = entry(validation={"loader": "waiting_data:loud"})
    missing = entry(source={"onnx": "tinny.onnx"})
    write_tiny(tmp_path, {"bad": missing, "loud": loud}, matrix={"precision": ["fp32", "fp16"]})
    done = run(tmp_path, "convert", "tiny.yaml", "--jobs", "3", "--json")
    models = json.loads(done.stdout)["models"]
    assert done.returncode == 2, done.stderr
    assert list(models) == ["bad-fp32", "bad-fp16", "loud-fp32", "loud-fp16"]
    assert [model["status"] in ("built", "validated") for model in models.values()] == [False, False, True, True]
    assert models["bad-fp32"]["error"]["type"] == "ConfigError"
    assert models["bad-fp32"]["error"]["stage"] == "load"
    assert "did you mean 'tiny.onnx'" in models["bad-fp32"]["error"]["message"]
    assert "from Python" in done.stderr
    assert "from C" in done.stderr
    assert "loud-fp16: build: " in done.stderr
    assert sorted(os.listdir(tmp_path / "artifacts")) == ["index.html", "loud-fp16", "loud-fp32"]
    assert trtforge.open_artifact(tmp_path / "artifacts" / "loud-fp16").facts["precision"] == "fp16"

    again = run(tmp_path, "convert", "tiny.yaml", "--only", "loud", "--json")
    models = json.loads(again.stdout)["models"]
    assert again.returncode == 0
    assert {model["status"] for model in models.values()} == {"unchanged"}
    assert max(model["seconds"]["check"] for model in models.values()) < 0.5
    table = run(tmp_path, "convert", "tiny.yaml")
    assert table.returncode == 2
    assert table.stdout.count("unchanged") == 2
    assert "failed (load)" in table.stdout


def test_one_model_is_skipped_without_torch_or_converted_by_force(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    assert run(tmp_path, "convert", "tiny.yaml").returncode == 0
    manifest = tmp_path / "artifacts" / "tiny" / "manifest.json"
    before = manifest.stat().st_ino
    code = (
        "import sys; sys.argv = ['trtforge', 'convert', 'tiny.yaml']\n"
        "from trtforge.converter import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: print(end.code or 0, *[m for m in ('torch', 'onnx', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0"
    assert "unchanged" in done.stdout
    assert manifest.stat().st_ino == before
    forced = run(tmp_path, "convert", "tiny.yaml", "--force", "--json")
    assert json.loads(forced.stdout)["models"]["tiny"]["status"] in ("built", "validated")
    assert manifest.stat().st_ino != before


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_being_stopped_stops_all_and_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "waiting_data.py").write_text(WAITING)
    write_tiny(tmp_path, {"a": slow("a.pid"), "b": slow("b.pid"), "c": slow("c.pid")})
    with start(tmp_path, "convert", "tiny.yaml", "--jobs", "2") as batch:
        wait_for(lambda: (tmp_path / "a.pid").exists() and (tmp_path / "b.pid").exists())
        pids = descendants(batch.pid)
        batch.send_signal(how)
        _, err = batch.communicate(timeout=30)
    assert batch.returncode == 128 + how
    assert f"stopped by {how.name}" in err
    assert "Traceback" not in err
    assert len(pids) >= 2
    assert all(is_gone(pid) for pid in pids)
    assert not (tmp_path / "c.pid").exists()
    assert os.listdir(tmp_path / "artifacts") == []


def test_killed_child_fails_alone_and_killed_batch_takes_its_children_with_it(tmp_path: Path) -> None:
    (tmp_path / "waiting_data.py").write_text(WAITING)
    write_tiny(tmp_path, {"a": slow("a.pid"), "b": entry(), "c": slow("c.pid")})
    with start(tmp_path, "convert", "tiny.yaml", "--json") as batch:
        wait_for(lambda: (tmp_path / "a.pid").exists() and (tmp_path / "a.pid").read_text())
        os.kill(int((tmp_path / "a.pid").read_text()), signal.SIGKILL)
        wait_for(lambda: (tmp_path / "c.pid").exists() and (tmp_path / "c.pid").read_text())
        assert (tmp_path / "artifacts" / "b").is_dir()
        child = int((tmp_path / "c.pid").read_text())
        batch.kill()
        _, err = batch.communicate()
    wait_for(lambda: is_gone(child), 20)
    assert "error in a [record]: the process that converts a was ended by SIGKILL" in err
    assert "memory" in err
    # c's child unwound and a's folder was swept by those that came after it
    assert os.listdir(tmp_path / "artifacts") == ["b"]


@pytest.mark.slow
def test_death_of_one_process_is_exit_3_in_table_and_json(tmp_path: Path) -> None:
    (tmp_path / "crashing_data.py").write_text("import os\ndef crash():\n    os.abort()\n")
    crash = entry(validation={"loader": "crashing_data:crash"})
    write_tiny(tmp_path, {"a": crash, "b": {**crash, "precision": "fp16"}})
    done = run(tmp_path, "convert", "tiny.yaml", "--jobs", "2", "--json")
    assert done.returncode == 3
    errors = [model["error"] for model in json.loads(done.stdout)["models"].values()]
    assert {(error["type"], error["stage"]) for error in errors} == {("ChildCrashError", "record")}
    assert all("SIGABRT" in error["message"] and "fix:" in error["message"] for error in errors)


@pytest.mark.slow
def test_two_batches_into_one_folder_do_not_hurt_each_other(tmp_path: Path) -> None:
    write_tiny(tmp_path, {"a": entry(), "b": entry(precision="fp16")})
    batches = [start(tmp_path, "convert", "tiny.yaml", "--jobs", "2", "--force", "--json") for _ in range(2)]
    for batch in batches:
        out, err = batch.communicate(timeout=120)
        assert batch.returncode == 0, err
        assert len(json.loads(out)["models"]) == 2
    assert sorted(os.listdir(tmp_path / "artifacts")) == ["a", "b", "index.html"]
    for name in "ab":
        assert trtforge.open_artifact(tmp_path / "artifacts" / name).name == name


def test_every_answer_of_a_child_that_says_nothing(tmp_path: Path) -> None:
    """The file was edited between the batch's reading it and the child's."""
    from trtforge.converter.batch import Outcome
    from trtforge.converter.batch_children import Asked, convert_in_children

    write_tiny(tmp_path)
    seen: list[Outcome] = []
    texts: list[str] = []
    asked = [Asked("gone", tmp_path / "out" / "gone")]
    convert_in_children(
        tmp_path / "tiny.yaml", asked, tmp_path / "out", jobs=1, force=False,
        on_event=lambda name, event: None, on_text=texts.append, on_outcome=seen.append,
    )  # fmt: skip
    assert [outcome.exit_code for outcome in seen] == [2]
    assert "no model 'gone'" in "".join(texts)
