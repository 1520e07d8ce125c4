"""Which backend takes which option, what it says where it does not, and that the builder gets what was asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trt_models as models

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.trt.backend import Backend, capabilities_of
from trtforge.runtime.trt.build import BuildRequest, build_engine
from trtforge.runtime.trt.options import BuildOptions, check_options, set_options
from trtforge.runtime.trt.timing_cache import keep_timings, use_timings

EVERYTHING = BuildOptions(
    optimization_level=4,
    workspace_mib=64,
    tiling="moderate",
    timing_cache=Path("timings.bin"),
    version_compatible=True,
    hardware_compatibility="same_compute_capability",
    weight_streaming=True,
    refit=True,
)
NOT_IN_RTX = ("timing_cache", "version_compatible", "hardware_compatibility", "refit")


def _backend(name: str, version: str) -> Backend:
    return Backend(name, name.replace("-", "_"), version, capabilities_of(name, version))


def test_full_tensorrt_takes_every_option():
    for version in ("10.14.1.48", "11.4.1.2"):
        check_options(EVERYTHING, _backend("tensorrt", version))
    with pytest.raises(ConfigError, match=r"TensorRT 10\.8\.0\.43 has no hardware_compatibility") as caught:
        check_options(EVERYTHING, _backend("tensorrt", "10.8.0.43"))
    assert "10.14 or newer" in caught.value.fix


@pytest.mark.parametrize("name", NOT_IN_RTX)
def test_rtx_refuses_what_it_lacks_by_name_and_says_what_to_do(name):
    asked = replace(BuildOptions(), **{name: getattr(EVERYTHING, name)})
    with pytest.raises(ConfigError, match=rf"TensorRT-RTX 1\.7\.1\.116 has no {name}") as caught:
        check_options(asked, _backend("tensorrt-rtx", "1.7.1.116"))
    assert caught.value.why
    assert "backend: tensorrt" in caught.value.fix


def test_rtx_takes_the_rest_and_its_builder_gets_it():
    trt = pytest.importorskip("tensorrt_rtx")
    asked = replace(EVERYTHING, **{name: getattr(BuildOptions(), name) for name in NOT_IN_RTX})
    check_options(asked, _backend("tensorrt-rtx", "1.7.1.116"))
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    config = builder.create_builder_config()
    set_options(trt, config, asked)
    assert config.builder_optimization_level == 4
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    assert config.tiling_optimization_level == trt.TilingOptimizationLevel.MODERATE
    assert config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    assert not config.get_flag(trt.BuilderFlag.REFIT)


@pytest.mark.parametrize(("name", "value"), [("tiling", "hard"), ("hardware_compatibility", "hopper")])
def test_a_value_that_no_backend_knows(name, value):
    with pytest.raises(ConfigError, match=f"{name} '{value}' is unknown"):
        check_options(replace(BuildOptions(), **{name: value}), _backend("tensorrt", "11.0.0.1"))


def test_a_refused_option_stops_a_build_before_its_child(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    path = models.write(tmp_path, models.STATIC)
    request = BuildRequest(
        path, tmp_path / "m.engine", "tensorrt-rtx", (), tf32=False, options=BuildOptions(version_compatible=True)
    )
    with pytest.raises(ConfigError, match="has no version_compatible"):
        build_engine(request)
    assert not (tmp_path / "m.engine").exists()


def test_options_survive_the_manifest():
    assert BuildOptions.from_json(EVERYTHING.to_json()) == EVERYTHING
    older = {"backend": "auto", "compute_capabilities": [], "optimization_level": 2, "workspace_mib": None}
    assert BuildOptions.from_json(older) == BuildOptions(optimization_level=2)


# TensorRT-RTX has a timing cache's interface, and no timings: what is shown with it is the file's handling.
@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_a_timing_cache_is_made_read_again_and_replaced_where_it_is_corrupt(tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
    place = tmp_path / "a new folder" / "timings.bin"
    config = builder.create_builder_config()
    assert use_timings(config, place) == []
    keep_timings(config, place)
    first = place.read_bytes()
    again = builder.create_builder_config()
    assert use_timings(again, place) == []
    keep_timings(again, place)
    assert place.read_bytes() == first
    place.write_bytes(b"no timings at all")
    third = builder.create_builder_config()
    (warning,) = use_timings(third, place)
    assert f"{place} (17 bytes) is ignored: corrupt" in warning
    keep_timings(third, place)
    assert place.read_bytes() == first
    assert {path.name for path in place.parent.iterdir()} == {"timings.bin", ".timings.bin.lock"}
