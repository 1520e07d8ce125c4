"""Faults under a conversion: its exit code, what it says, what it leaves, and the older artifact, which stays whole."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import entry, run, wait_for, write_tiny

import trtforge

# Ends itself, or its next child, when a stage begins. argv: stage, "parent" or "child", signal, then the command line.
ASSASSIN = """
import os, sys
from trtforge.converter import cli, progress
from trtforge.runtime import child
stage, victim, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.argv[1:] = sys.argv[4:]
begin, spawn = progress.Stages.stage, child._spawn
armed = []
def watched(self, name, text=""):
    if name == stage:
        armed.append(True)
        if victim == "parent":
            os.kill(os.getpid(), number)
    return begin(self, name, text)
def shot(log, env):
    process, fd = spawn(log, env)
    if armed and victim == "child":
        os.kill(process.pid, number)
    return process, fd
progress.Stages.stage, child._spawn = watched, shot
cli.main()
"""
STAGES = ("load", "export", "record", "prove", "plan", "cast", "build", "package")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_tiny(folder)
    done = run(folder, "convert", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    return folder / "artifacts" / "tiny"


@pytest.fixture
def standing(made: Path, tmp_path: Path) -> Path:
    """`tmp_path` with an older artifact, and a file that asks for another precision."""
    shutil.copytree(made, tmp_path / "artifacts" / "tiny")
    write_tiny(tmp_path, {"tiny": entry(precision="fp16")})
    return tmp_path


@contextlib.contextmanager
def no_orphans() -> Iterator[dict[str, str]]:
    """Gives an environment; afterwards no process has it any more."""
    mark = f"TRTFORGE_TEST_MARK={uuid.uuid4()}"
    yield dict([mark.split("=")])

    def living() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark.encode() in path.read_bytes():
                    found.append(path.parent.name)
        return found

    wait_for(lambda: not living(), 20)


def convert(folder: Path, *args: str, driver: tuple[str, ...] = (), **more: Any) -> subprocess.CompletedProcess[str]:
    with no_orphans() as env:
        env |= more.pop("env", {})
        if driver:
            more["command"] = [sys.executable, "-c", *driver]
        return run(folder, "convert", "tiny.yaml", *args, env=env, **more)


@pytest.mark.parametrize("stage", [pytest.param(s, marks=[] if s == "package" else [pytest.mark.slow]) for s in STAGES])
def test_sigkill_at_a_stage_leaves_the_older_artifact_and_the_next_run_sweeps(standing: Path, stage: str) -> None:
    before = tree(standing / "artifacts" / "tiny")
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


@pytest.mark.parametrize("room", [20, *(pytest.param(kib, marks=pytest.mark.slow) for kib in (4, 12, 48))])
def test_full_disk(standing: Path, room: int) -> None:
    """A file system of a few KiB, in a mount namespace of its own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    (standing / "full").mkdir()
    taken = sum((4095 + path.stat().st_size) // 4096 * 4 for path in (standing / "artifacts").rglob("*"))
    script = (
        f"mount -t tmpfs -o size={taken + room}k none full && cp -r artifacts/tiny full/ && "
        f"{sys.executable} -P -m trtforge convert tiny.yaml -o full; code=$?; ls -A full; "
        "diff -r full/tiny artifacts/tiny && exit $code"
    )
    with no_orphans() as env:
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script],
            cwd=standing, env={**os.environ, **env}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert "No space left on device" in done.stderr
    assert re.search(r"error in tiny \[(export|record|prove|cast|build|package)\]: ", done.stderr)
    assert "fix: free space" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1] == "tiny"


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 12])
def test_limit_of_file_sizes(standing: Path, blocks: int) -> None:
    before = tree(standing / "artifacts" / "tiny")
    shell = ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh", sys.executable, "-m", "trtforge"]
    done = convert(standing, command=shell)
    assert done.returncode == 5, done.stderr
    assert "File too large" in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(standing / "artifacts" / "tiny") == before
    assert os.listdir(standing / "artifacts") == ["tiny"]


@pytest.mark.parametrize(
    ("closed", "mode", "code", "said"),
    [
        ("artifacts", 0o555, 5, "cannot write into artifacts"),
        ("artifacts/tiny", 0o555, 5, "tiny is read-only"),
        ("tiny.onnx", 0o000, 2, "tiny.onnx cannot be read"),
    ],
)
def test_no_permission(standing: Path, closed: str, mode: int, code: int, said: str) -> None:
    """Without root's capabilities where the tests run as root, whom permissions do not stop."""
    prefix: list[str] = []
    if os.getuid() == 0:
        prefix = ["setpriv", "--bounding-set=-all"]
        if shutil.which("setpriv") is None or subprocess.run([*prefix, "true"], check=False).returncode != 0:
            pytest.skip("root cannot give up its capabilities here")
    before = tree(standing / "artifacts" / "tiny")
    (standing / closed).chmod(mode)
    done = convert(standing, command=[*prefix, sys.executable, "-m", "trtforge"])
    (standing / closed).chmod(0o755)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(standing / "artifacts" / "tiny") == before
    assert os.listdir(standing / "artifacts") == ["tiny"]


def test_read_only_files_in_a_writable_artifact_are_replaced(standing: Path) -> None:
    target = standing / "artifacts" / "tiny"
    for path in target.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    from trtforge.runtime.publish import publish_folder, staging_folder

    with staging_folder(target.parent) as staging:
        shutil.copytree(target, staging / "artifact")
        publish_folder(staging / "artifact", target)
    assert os.listdir(target.parent) == ["tiny"]
    assert all(path.stat().st_mode & stat.S_IWUSR for path in target.rglob("*"))


def test_a_symlink_in_the_artifact_s_place_is_refused_before_the_work(standing: Path) -> None:
    target = standing / "artifacts" / "tiny"
    target.rename(standing / "elsewhere")
    target.symlink_to(standing / "elsewhere")
    before = tree(standing / "elsewhere")
    done = convert(standing)
    assert done.returncode == 5
    assert "is a symbolic link, not an artifact's folder" in done.stderr
    assert "fix: remove it, or choose another --output" in done.stderr
    assert "export" not in done.stderr
    assert target.is_symlink()
    assert tree(standing / "elsewhere") == before


REMOVERS = """
import pathlib, shutil
def source():
    pathlib.Path("tiny.onnx").unlink()
    return ones()
def staging():
    shutil.rmtree(next(pathlib.Path("artifacts").glob(".trtforge-staging-*")))
    return ones()
def ones():
    import numpy
    return [numpy.ones((2, 4), "float32")]
"""


@pytest.mark.parametrize(("what", "code"), [("staging", 5), pytest.param("source", 0, marks=pytest.mark.slow)])
def test_a_file_removed_under_us(standing: Path, what: str, code: int) -> None:
    (standing / "removers.py").write_text(REMOVERS)
    write_tiny(standing, {"tiny": entry(precision="fp16", validation={"loader": f"removers:{what}"})})
    before = tree(standing / "artifacts" / "tiny")
    done = convert(standing)
    assert done.returncode == code, done.stderr  # the graph was read whole before, and is needed no more
    assert "Traceback" not in done.stderr
    assert os.listdir(standing / "artifacts") == ["tiny"]
    if code:
        assert "is gone" in done.stderr
        assert "fix:" in done.stderr
        assert tree(standing / "artifacts" / "tiny") == before
    else:
        assert trtforge.open_artifact(standing / "artifacts" / "tiny").facts["precision"] == "fp16"


JUMPING = """
import itertools, time
jumps, plain = itertools.count(), time.time
time.time = lambda: plain() + (1e8 if next(jumps) % 2 else -1e8)
from trtforge.converter import cli
cli.main()
"""


@pytest.mark.slow
def test_a_clock_that_jumps(standing: Path) -> None:
    done = convert(standing, "--json", driver=(JUMPING,))
    assert done.returncode == 0, done.stderr
    for path in standing.rglob("*"):  # and what was made then is from the future
        os.utime(path, (4e9, 4e9))
    again = convert(standing, "--json")
    assert '"unchanged"' in again.stdout, again.stderr
    assert os.listdir(standing / "artifacts") == ["tiny"]


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        pytest.param({}, marks=pytest.mark.slow),
    ],
    ids=["ascii", "utf-8"],
)
def test_paths_with_spaces_and_unicode_in_any_locale(tmp_path: Path, env: dict[str, str]) -> None:
    folder = tmp_path / "a b 'ünï' 日本"
    write_tiny(folder, {"tiny": entry(source={"onnx": "größe 1.onnx"})})
    (folder / "tiny.onnx").rename(folder / "größe 1.onnx")
    done = convert(folder, "--output", "out ö", "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert '"artifact": "out ö/tiny"' in done.stdout
    assert os.listdir(folder / "out ö") == ["tiny"]
    missing = convert(folder, "--only", "tïny", env=env)
    assert missing.returncode == 2
    assert "no model 'tïny'" in missing.stderr
