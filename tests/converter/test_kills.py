"""A conversion, or a process of it, that ends at any moment: the exit code, and the older artifact stays whole."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fault_tools import GPU, convert, made, standing, tree
from tiny_models import entry, write_tiny

import trtforge

__all__ = ["made", "standing"]  # pytest finds fixtures by their names here

# Ends itself when a stage begins, or a child in it. argv: stage ("prove: engine" is the first whose text begins so),
# "parent", "child" (each one) or "first" (child), signal, then the command line.
ASSASSIN = """
import os, sys
from trtforge.converter import cli, progress
from trtforge.runtime import child
stage, victim, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv[1:] = sys.argv[4:]
begin, spawn = progress.Stages.stage, child._spawn
armed = []
def watched(self, name, text=""):
    armed[:] = [True] * f"{name}: {text}".startswith(stage)
    if armed and victim == "parent":
        os.kill(os.getpid(), number)
    return begin(self, name, text)
def shot(log, env):
    process, fd = spawn(log, env)
    if armed and victim != "parent":
        armed[:] = armed if victim == "child" else []
        os.kill(process.pid, number)
    return process, fd
progress.Stages.stage, child._spawn = watched, shot
cli.main()
"""
STAGES = ("load", "export", "record", "prove", "plan", "calibrate", "search", "cast", "build", "package")
BATCHES = """
def batches():
    import numpy
    return [numpy.random.default_rng(seed).normal(size=(2, 4)).astype("float32") for seed in range(4)]
"""


def quantized(**more: Any) -> dict[str, Any]:
    """Needs `BATCHES` in `fault_data.py`."""
    return entry(precision="int8", calibration={"loader": "fault_data:batches"}, **more)


@pytest.mark.parametrize("stage", [pytest.param(s, marks=[] if s == "package" else [pytest.mark.slow]) for s in STAGES])
def test_sigkill_at_a_stage_leaves_the_older_artifact_and_the_next_run_sweeps(standing: Path, stage: str) -> None:
    before = tree(standing / "artifacts" / "tiny")
    (standing / "fault_data.py").write_text(BATCHES)
    if stage in ("calibrate", "search"):
        write_tiny(standing, {"tiny": quantized() if stage == "calibrate" else entry(precision="auto")})
    done = convert(standing, driver=(ASSASSIN, stage, "parent", str(int(signal.SIGKILL))))
    assert done.returncode == -signal.SIGKILL
    assert tree(standing / "artifacts" / "tiny") == before
    left = set(os.listdir(standing / "artifacts")) - {"tiny"}
    assert len(left) == (0 if stage == "load" else 1)
    assert all(name.startswith(".trtforge-staging-") for name in left)
    write_tiny(standing, {"other": entry(source={"onnx": "gone.onnx"}), "tiny": entry()})
    assert convert(standing, "--only", "tiny").returncode == 0
    if left:  # `tiny` is unchanged: sweeping is the next conversion's business
        from trtforge.runtime.publish import staging_folder

        with staging_folder(standing / "artifacts"):
            pass
    assert os.listdir(standing / "artifacts") == ["tiny"]
    assert trtforge.open_artifact(standing / "artifacts" / "tiny").facts["precision"] == "fp32"


@pytest.mark.parametrize(
    ("stage", "number", "code", "said"),
    [
        ("build", signal.SIGKILL, 3, "was killed (SIGKILL) while starting"),
        pytest.param("build", signal.SIGSEGV, 3, "crashed natively (SIGSEGV)", marks=pytest.mark.slow),
        pytest.param("build", signal.SIGABRT, 3, "crashed natively (SIGABRT)", marks=pytest.mark.slow),
        pytest.param("export", signal.SIGSEGV, 3, "onnxruntime crashed on", marks=pytest.mark.slow),
        pytest.param("prove", signal.SIGKILL, 4, "onnxruntime crashed on the export ONNX", marks=pytest.mark.slow),
        pytest.param("prove", signal.SIGSEGV, 4, "onnxruntime crashed on the export ONNX", marks=pytest.mark.slow),
    ],
)
def test_a_child_s_death_is_an_error_with_a_way_out(
    standing: Path, stage: str, number: signal.Signals, code: int, said: str
) -> None:
    before = tree(standing / "artifacts" / "tiny")
    done = convert(standing, driver=(ASSASSIN, stage, "child", str(int(number))))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert number.name in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(standing / "artifacts" / "tiny") == before
    assert set(os.listdir(standing / "artifacts")) <= {"tiny", "tiny.failed"}


def test_death_of_a_candidate_s_child_ends_that_candidate_alone(standing: Path) -> None:
    write_tiny(standing, {"tiny": entry(precision="auto")})
    done = convert(standing, driver=(ASSASSIN, "search", "first", str(int(signal.SIGSEGV))))
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"bf16 passes with \d layers in fp32", done.stderr
    )  # a crash is a failure like others: it is mended
    assert os.listdir(standing / "artifacts") == ["tiny"]


@pytest.mark.parametrize(
    ("number", "said", "fix"),
    [
        (signal.SIGKILL, "was killed (SIGKILL)", "free memory"),
        pytest.param(
            signal.SIGSEGV, "ended its process natively (SIGSEGV)", "build the engine", marks=pytest.mark.slow
        ),
    ],
)
def test_death_of_the_child_that_runs_the_engine(standing: Path, number: signal.Signals, said: str, fix: str) -> None:
    before = tree(standing / "artifacts" / "tiny")
    write_tiny(standing, {"tiny": entry(precision="fp16", target={"compute_capabilities": ["8.9"]})})
    driver = GPU.format(capability="8.9") + ASSASSIN
    done = convert(standing, driver=(driver, "prove: engine", "child", str(int(number))))
    assert done.returncode == 5, done.stderr
    assert "error in tiny [prove]: " in done.stderr
    assert said in done.stderr
    assert f"fix: {fix}" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(standing / "artifacts" / "tiny") == before
    assert os.listdir(standing / "artifacts") == ["tiny"]


def test_a_candidate_whose_float_graph_does_not_run_is_not_mended(standing: Path) -> None:
    """All children of the search die; of the later stages, which prove what was chosen, none does."""
    write_tiny(standing, {"tiny": entry(precision="auto")})
    done = convert(standing, driver=(ASSASSIN, "search", "child", str(int(signal.SIGKILL))))
    assert done.returncode == 0, done.stderr
    for kind in ("bf16", "fp16"):
        assert f"{kind} does not pass: onnxruntime crashed on the precision ONNX" in done.stderr
        assert re.search(f"note: {kind} is not mended: .* onnx.run was ended by SIGKILL", done.stderr)
    assert "Traceback" not in done.stderr
    assert os.listdir(standing / "artifacts") == ["tiny"]
    assert trtforge.open_artifact(standing / "artifacts" / "tiny").facts["precision"] == "fp32"


# Ends its own process while the pipeline is at a stage. `made` is loaded, traced and run by the batch's child.
SUICIDES = """
import os, signal, torch
class Dies(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
    def forward(self, x):
        os.kill(os.getpid(), signal.SIGKILL)
        return self.linear(x)
def made():
    return Dies()
def batches():
    os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.parametrize("stage", ["export", pytest.param("calibrate", marks=pytest.mark.slow)])
def test_death_of_a_batch_s_child_at_work_leaves_the_others(standing: Path, stage: str) -> None:
    before = tree(standing / "artifacts" / "tiny")
    (standing / "fault_data.py").write_text(SUICIDES)
    dying = quantized() if stage == "calibrate" else entry(source={"factory": "fault_data:made"})
    write_tiny(standing, {"tiny": dying, "other": entry()})
    done = convert(standing)
    name = "SIGSEGV" if stage == "calibrate" else "SIGKILL"
    assert done.returncode == 3, done.stderr
    assert f"error in tiny [{stage}]: the process that converts tiny was ended by {name}" in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(standing / "artifacts" / "tiny") == before
    assert sorted(os.listdir(standing / "artifacts")) == ["index.html", "other", "tiny"]


# Ends itself at one step of publishing. argv: step, the staged copy's source, target.
PUBLISHER = """
import os, shutil, signal, sys
from pathlib import Path
from trtforge.runtime import publish
step, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
way, _, step = step.partition(": ")
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
def then(function):
    def both(*args, **kwargs):
        function(*args, **kwargs)
        die()
    return both
def half(path, *args, **kwargs):
    next(p for p in sorted(Path(path).rglob("*")) if p.is_file()).unlink()
    die()
if way == "aside":
    publish._exchange = lambda a, b: False
if step == "syncing":
    publish.os.fsync = die
elif step == "first step":
    publish._exchange, publish._replace = die, die
elif step == "after the exchange":
    publish._exchange = then(publish._exchange)
elif step == "between the renames":
    rename = os.rename
    publish.os.rename = then(rename)
elif step == "after the renames":
    publish._remove = die
with publish.staging_folder(target.parent) as staging:
    shutil.copytree(source, staging / "artifact")
    if step == "removing the old":
        publish.shutil.rmtree = half
    publish.publish_folder(staging / "artifact", target)
"""


@pytest.mark.parametrize(
    "step",
    [
        *("exchange: syncing", "exchange: first step", "exchange: after the exchange", "exchange: removing the old"),
        *("aside: first step", "aside: between the renames", "aside: after the renames", "aside: removing the old"),
    ],
)
def test_sigkill_at_a_publish_step_leaves_one_artifact_whole(standing: Path, step: str, made: Path) -> None:
    from trtforge.runtime.publish import staging_folder

    new, target = standing / "new", standing / "artifacts" / "tiny"
    shutil.copytree(made, new)
    old = tree(target)
    with (new / "report.html").open("a") as file:
        file.write("<!-- newer -->")
    newer = tree(new)
    done = subprocess.run([sys.executable, "-c", PUBLISHER, step, str(new), str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    if step != "aside: between the renames":  # no exchange on this file system: the one moment without either
        assert tree(target) in (old, newer)
    with staging_folder(target.parent):
        pass
    assert tree(target) == (newer if "after" in step or "removing" in step else old)
    assert os.listdir(target.parent) == ["tiny"]
