import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from trtforge.runtime.errors import ConfigError, MissingDependencyError
from trtforge.runtime.trt.backend import Backend, capabilities_of, find_backend, import_backend


def test_auto_finds_what_is_installed_without_importing_it():
    code = (
        "import sys; from trtforge.runtime.trt.backend import find_backend; b = find_backend(); "
        "assert not {'tensorrt', 'tensorrt_rtx', 'numpy', 'torch'} & set(sys.modules); print(b.name, b.version)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    backend = find_backend()
    assert said == [backend.name, backend.version]
    assert import_backend(backend).__version__ == backend.version


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'tensorrt-rtx'") as caught:
        find_backend("tensorrt_rtx")
    assert caught.value.exit_code == 2


def _run_with_path(tmp_path: Path, name: str) -> str:
    """`find_backend(name)` where nothing but `tmp_path` and our own code can be imported."""
    code = f"""
import sys, pathlib
sys.path = [p for p in sys.path if "site-packages" not in p] + [{str(tmp_path)!r}]
from trtforge.runtime.trt.backend import find_backend
try:
    b = find_backend({name!r})
    print(b.name, b.version, b.capabilities.needs_gpu_to_build)
except Exception as error:
    print(type(error).__name__, error)
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    return done.stdout


def _install(folder: Path, module: str, distribution: str, version: str) -> None:
    (folder / module).mkdir()
    (folder / module / "__init__.py").write_text(f'__version__ = "{version}"\n')
    if distribution:
        info = folder / f"{distribution}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")


def test_nothing_installed_names_both_pip_lines(tmp_path):
    said = _run_with_path(tmp_path, "auto")
    assert said.startswith("MissingDependencyError")
    assert "trtforge[rtx]" in said
    assert "trtforge[tensorrt]" in said


def test_a_folder_named_tensorrt_is_no_tensorrt(tmp_path):
    (tmp_path / "tensorrt").mkdir()
    assert _run_with_path(tmp_path, "tensorrt").startswith("MissingDependencyError TensorRT is not installed")


def test_auto_prefers_the_full_tensorrt(tmp_path):
    _install(tmp_path, "tensorrt_rtx", "tensorrt_rtx", "1.7.1.116")
    assert _run_with_path(tmp_path, "auto").split() == ["tensorrt-rtx", "1.7.1.116", "False"]
    _install(tmp_path, "tensorrt", "tensorrt_cu13", "11.4.0.1")
    assert _run_with_path(tmp_path, "auto").split() == ["tensorrt", "11.4.0.1", "True"]
    assert _run_with_path(tmp_path, "tensorrt-rtx").split() == ["tensorrt-rtx", "1.7.1.116", "False"]


def test_a_version_without_metadata_is_read_from_the_module(tmp_path):
    _install(tmp_path, "tensorrt", "", "10.13.2.6")
    assert _run_with_path(tmp_path, "tensorrt").split() == ["tensorrt", "10.13.2.6", "True"]


def test_one_that_is_too_old_is_refused(tmp_path):
    _install(tmp_path, "tensorrt", "tensorrt", "8.6.1")
    said = _run_with_path(tmp_path, "tensorrt")
    assert said.startswith("MissingDependencyError TensorRT 8.6.1 is installed; the oldest that works is 10.8")
    assert "--upgrade" in said


def test_one_that_does_not_load_says_so():
    broken = Backend("tensorrt", "no_such_module_xyz", "11.0", capabilities_of("tensorrt", "11.0"))
    with pytest.raises(MissingDependencyError, match=r"TensorRT 11\.0 is installed but does not load"):
        import_backend(broken)


@pytest.mark.parametrize(
    ("name", "version", "facts"),
    [
        ("tensorrt-rtx", "1.5.0.1", {"int8_conv": False, "needs_gpu_to_build": False, "max_opset": 23}),
        ("tensorrt-rtx", "1.6.1.120", {"int8_conv": False, "int8_matmul": True, "fp8": True, "refit": False}),
        ("tensorrt-rtx", "1.7.1.116", {"int8_conv": True, "plugins": False, "timing_cache": False}),
        ("tensorrt-rtx", "2.0.0", {"int8_conv": True}),
        ("tensorrt", "10.8.0.43", {"needs_gpu_to_build": True, "explicit_batch_flag": True, "max_opset": 20}),
        ("tensorrt", "10.14.1.48", {"explicit_batch_flag": True, "max_opset": 23, "targets": ()}),
        ("tensorrt", "10.16.0", {"strongly_typed_flag": True, "int8_conv": True, "doomed_operators": frozenset()}),
        ("tensorrt", "11.4.0", {"explicit_batch_flag": False, "strongly_typed_flag": False, "timing_cache": True}),
        ("tensorrt", "12.0", {"explicit_batch_flag": False}),
    ],
)
def test_the_table(name, version, facts):
    row = dataclasses.asdict(capabilities_of(name, version))
    assert {key: row[key] for key in facts} == facts


@pytest.mark.parametrize(
    ("name", "version", "device", "runs"),
    [
        ("tensorrt-rtx", "1.6.1", "9.0", True),
        ("tensorrt-rtx", "1.7.1", "9.0", False),
        ("tensorrt-rtx", "1.7.1", "8.9", True),
        ("tensorrt-rtx", "1.7.1", "12.0", True),
        ("tensorrt-rtx", "1.7.1", "7.0", False),
        ("tensorrt", "11.0", "9.0", True),
        ("tensorrt", "10.8", "10.0", True),
    ],
)
def test_devices(name, version, device, runs):
    assert capabilities_of(name, version).runs_on(device) is runs


@pytest.mark.parametrize(("name", "version"), [("tensorrt-rtx", "1.4.9"), ("tensorrt", "10.7.0"), ("tensorrt", "8.6")])
def test_old_versions_have_no_row(name, version):
    with pytest.raises(MissingDependencyError, match="oldest"):
        capabilities_of(name, version)
