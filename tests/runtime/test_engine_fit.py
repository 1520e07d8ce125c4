"""What an engine is compared with before a byte of it is deserialised."""

from __future__ import annotations

import struct

import pytest

from trtforge.runtime.device import DeviceFacts, gpu_present
from trtforge.runtime.engine import Engine
from trtforge.runtime.errors import ArtifactError, ConfigError, MissingDependencyError
from trtforge.runtime.trt import load
from trtforge.runtime.trt.backend import Backend, capabilities_of, find_backend
from trtforge.runtime.trt.load import check_fit, loads_version
from trtforge.runtime.trt.options import LoadOptions

H100 = DeviceFacts("NVIDIA H100 80GB HBM3", "9.0", 132, "13.0", 1 << 36)
BUILT_ON_H100 = {"name": H100.name, "compute_capability": "9.0", "sm_count": 132}


def _backend(name: str, version: str) -> Backend:
    return Backend(name, name.replace("-", "_"), version, capabilities_of(name, version))


def _rtx_plan(path, version: str):
    numbers = bytes(int(number) for number in version.split("."))
    path.write_bytes(struct.pack("<4sxxxxQQ4s4sI", b"vtrt", 2, 64, numbers, b"vtrt", 2).ljust(64, b"\0"))
    return path


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(load, "device_facts", lambda: H100)


@pytest.mark.usefixtures("h100")
def test_a_plan_of_full_tensorrt_fits_the_same_gpu_and_release(tmp_path):
    backend = _backend("tensorrt", "11.0.0.1")
    path = tmp_path / "model.engine"
    assert check_fit(path, backend, version="11.0.0.1", device=BUILT_ON_H100) is H100
    assert check_fit(path, backend, version="11.0.0.1", device=None) is H100
    with pytest.raises(ArtifactError, match=r"built by TensorRT 11\.0\.0\.2, and 11\.0\.0\.1 is installed") as caught:
        check_fit(path, backend, version="11.0.0.2", device=BUILT_ON_H100)
    assert "pip install tensorrt==11.0.0.2" in caught.value.fix
    assert caught.value.exit_code == 5


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"sm_count": 114}, "sm_count 114; here: sm_count 132"),
        ({"name": "NVIDIA H200"}, "name NVIDIA H200; here: name NVIDIA H100 80GB HBM3"),
        ({"compute_capability": "8.9", "sm_count": 76}, "compute_capability 8.9, sm_count 76; here"),
    ],
)
def test_a_plan_of_full_tensorrt_is_tied_to_its_gpu_and_one_of_rtx_is_not(tmp_path, other, said):
    device = {**BUILT_ON_H100, **other}
    with pytest.raises(ArtifactError, match=said):
        check_fit(tmp_path / "model.engine", _backend("tensorrt", "11.0"), version="11.0", device=device)
    rtx = _rtx_plan(tmp_path / "rtx.engine", "1.6.1.120")
    assert check_fit(rtx, _backend("tensorrt-rtx", "1.6.1.120"), version="1.6.1.120", device=device) is H100


@pytest.mark.usefixtures("h100")
def test_a_release_of_rtx_that_refuses_the_gpu(tmp_path):
    path = _rtx_plan(tmp_path / "model.engine", "1.7.1.116")
    with pytest.raises(ArtifactError, match=r"TensorRT-RTX 1\.7\.1\.116 does not run on NVIDIA H100") as caught:
        check_fit(path, _backend("tensorrt-rtx", "1.7.1.116"))
    assert "compute capability 9.0" in caught.value.what


@pytest.mark.usefixtures("h100")
def test_the_plan_itself_is_believed_before_the_manifest(tmp_path):
    path = _rtx_plan(tmp_path / "model.engine", "1.6.1.120")
    with pytest.raises(ArtifactError, match=r"built by TensorRT-RTX 1\.6\.1\.120, and 1\.5\.0\.114 is installed"):
        check_fit(path, _backend("tensorrt-rtx", "1.5.0.114"), version="1.5.0.114")


@pytest.mark.parametrize(
    ("built", "installed", "loads"),
    [
        ("10.14.1.48", "10.14.1.48", True),
        ("10.14.1.48", "10.16.0.7", True),
        ("10.14.1.48", "10.9.0.34", False),
        ("10.8.0.43", "11.4.1.2", True),
        ("11.0.0.1", "10.16.0.7", False),
        ("11.0.0.1", "12.0.0.1", False),
    ],
)
def test_a_version_compatible_plan_loads_forwards_only(built, installed, loads):
    assert loads_version(built, installed, compatible=True) is loads
    assert loads_version(built, installed, compatible=False) is (built == installed)


@pytest.mark.usefixtures("h100")
def test_the_fit_goes_by_what_the_plan_was_built_for(tmp_path):
    path, newer = tmp_path / "model.engine", _backend("tensorrt", "11.4.1.2")
    compatible = LoadOptions(version_compatible=True)
    assert check_fit(path, newer, version="11.0.0.1", device=BUILT_ON_H100, options=compatible) is H100
    with pytest.raises(ArtifactError, match="is installed") as caught:
        check_fit(path, _backend("tensorrt", "10.14.0.1"), version="11.0.0.1", options=compatible)
    assert "later ones of its major" in caught.value.why
    a100 = {"name": "NVIDIA A100", "compute_capability": "8.0", "sm_count": 108}
    h200 = {**BUILT_ON_H100, "name": "NVIDIA H200"}
    same, ampere = (LoadOptions(hardware_compatibility=family) for family in ("same_compute_capability", "ampere_plus"))
    fits = {"version": "11.4.1.2"}
    assert check_fit(path, newer, device=a100, options=ampere, **fits) is H100
    assert check_fit(path, newer, device=h200, options=same, **fits) is H100
    with pytest.raises(ArtifactError, match=r"compute_capability 8\.0, sm_count 108; here") as caught:
        check_fit(path, newer, device=a100, options=same, **fits)
    assert "same_compute_capability" in caught.value.why


def test_an_engine_that_cannot_be_loaded_says_why(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    version = find_backend("tensorrt-rtx").version
    path = tmp_path / "model.engine"
    for data, said in ((b"", "is not a TensorRT-RTX plan"), (b"vtrt" + b"x" * 90, "its header says")):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=said):
            Engine(path, backend="tensorrt-rtx", version=version)
    with pytest.raises(ArtifactError, match="cannot read the engine"):
        Engine(tmp_path / "absent.engine", backend="tensorrt-rtx", version=version)
    _rtx_plan(path, "1.2.3.4")
    with pytest.raises(ArtifactError, match=r"built by TensorRT-RTX 1\.2\.3\.4"):
        Engine(path, backend="tensorrt-rtx", version=version)
    with pytest.raises(ConfigError, match="backend 'rtx' is unknown"):
        Engine(path, backend="rtx", version=version)


@pytest.mark.skipif(gpu_present(), reason="a GPU is here")
def test_without_a_gpu_or_the_backend(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    version = find_backend("tensorrt-rtx").version
    path = _rtx_plan(tmp_path / "model.engine", version)
    with pytest.raises(ArtifactError, match="there is none here"):
        Engine(path, backend="tensorrt-rtx", version=version)
    with pytest.raises(MissingDependencyError, match="TensorRT is not installed"):
        Engine(path, backend="tensorrt", version="11.0")
