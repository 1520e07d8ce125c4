"""Faults under a conversion: its exit code, what it says, what it leaves, and the older artifact, which stays whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from fault_tools import GPU, convert, made, no_orphans, standing, tree
from tiny_models import entry, run, write_tiny

import trtforge

__all__ = ["made", "standing"]  # pytest finds fixtures by their names here

# What find_backend finds where the full TensorRT is installed.
FULL = """
from trtforge.converter import revalidate
from trtforge.runtime.trt.backend import Backend, capabilities_of
version = "10.14.1.48"
revalidate.find_backend = lambda name: Backend(name, "tensorrt", version, capabilities_of(name, version))
"""


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


def test_a_yaml_file_named_in_unicode_with_spaces(standing: Path) -> None:
    name, before = "größe 日本.yaml", tree(standing / "artifacts" / "tiny")
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def convert_named(**top: object) -> subprocess.CompletedProcess[str]:
        write_tiny(standing, **top).rename(standing / name)
        with no_orphans() as env:
            return run(standing, "convert", name, env=env | ascii_locale)

    wrong = convert_named(models={"tiny": entry(dims={"n": "many"})})
    assert wrong.returncode == 2
    assert f"{name}:1: models.tiny.dims" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    assert tree(standing / "artifacts" / "tiny") == before
    # Two models are a batch, whose children read the file for themselves.
    done = convert_named(models={"tiny": entry(precision="fp16"), "other": entry()})
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(standing / "artifacts")) == ["index.html", "other", "tiny"]
    assert trtforge.open_artifact(standing / "artifacts" / "tiny").facts["precision"] == "fp16"


@pytest.mark.parametrize("name", ["größe 1", "../tiny", ".tiny"])
def test_a_model_s_name_that_makes_no_folder(standing: Path, name: str) -> None:
    write_tiny(standing, {name: entry()})
    done = convert(standing, env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 2
    assert f"tiny.yaml:1: models.{name}: must be made of letters a to z, digits and _ . -" in done.stderr
    assert os.listdir(standing / "artifacts") == ["tiny"]


def test_inputs_and_outputs_named_in_unicode_with_spaces(tmp_path: Path) -> None:
    write_tiny(tmp_path, {"tiny": entry(inputs={"größe x": {"shape": ["n", 4]}}, precision="fp16")})
    text = (tmp_path / "tiny.yaml").read_text()
    (tmp_path / "tiny.yaml").write_text(text.encode().decode("unicode_escape"), encoding="utf-8")
    proto = onnx.load(tmp_path / "tiny.onnx")
    names = {"x": "größe x", "y": "Ergebnis ü 1"}
    proto.graph.node[0].input[0] = proto.graph.input[0].name = names["x"]
    proto.graph.node[1].output[0] = proto.graph.output[0].name = names["y"]
    onnx.save(proto, tmp_path / "tiny.onnx")
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = convert(tmp_path, env=ascii_locale)
    assert done.returncode == 0, done.stderr
    again = run(tmp_path, "validate", "artifacts/tiny", "--json", env=ascii_locale)
    assert again.returncode == 0, again.stderr
    artifact = trtforge.open_artifact(tmp_path / "artifacts" / "tiny")
    assert [spec.name for spec in (*artifact.inputs, *artifact.outputs)] == list(names.values())


@pytest.mark.parametrize("made_for", ["another release", "another release's GPUs", "another GPU's plan"])
def test_an_engine_of_another_release_or_device(standing: Path, made_for: str) -> None:
    """The last as full TensorRT, whose plans one model of GPU runs; the others by this machine's TensorRT-RTX."""
    from trtforge.converter.manifest import write_manifest
    from trtforge.runtime.trt.backend import find_backend

    target = standing / "artifacts" / "tiny"
    driver = GPU.format(capability="9.0") + "from trtforge.converter import cli\ncli.main()"
    said = "does not run on NVIDIA Fake (compute capability 9.0)"
    facts = json.loads((target / "manifest.json").read_text())
    kept = {key: value for key, value in facts.items() if key not in ("schema", "status", "name", "files")}
    if made_for == "another release":
        plan = bytearray((target / "model.engine").read_bytes())
        plan[24:28] = struct.pack("4B", 1, 2, 3, 4)  # the header names the release
        (target / "model.engine").write_bytes(plan)
        kept["engine"]["version"] = "1.2.3.4"
        write_manifest(target, "built", "tiny", kept)
        said = "was built by TensorRT-RTX 1.2.3.4, and "
    elif made_for == "another GPU's plan":
        kept["engine"] |= {"backend": "tensorrt", "version": "10.14.1.48"}
        kept["device"] = {"name": "NVIDIA Fake", "compute_capability": "8.9", "sm_count": 76}
        write_manifest(target, "validated", "tiny", kept)
        driver = FULL + driver
        said = (
            "was built on another GPU: compute_capability 8.9, sm_count 76; here: compute_capability 9.0, sm_count 132"
        )
    elif "9.0" not in find_backend("tensorrt-rtx").capabilities.refused_devices:
        pytest.skip("this TensorRT-RTX runs on compute capability 9.0")
    before = tree(target)
    with no_orphans() as env:
        done = run(standing, "validate", "artifacts/tiny", env=env, command=[sys.executable, "-c", driver])
    assert done.returncode == 5, done.stderr
    assert said in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(target) == before
    assert os.listdir(standing / "artifacts") == ["tiny"]
