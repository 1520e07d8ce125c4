"""What of the builder's options TensorRT-RTX really has: what runtime/trt/backend.py and options.py say of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from trtforge.runtime.device import gpu_present

trt = pytest.importorskip("tensorrt_rtx")


def _build(configure: Callable[[Any], None]) -> tuple[bytes | None, Any]:
    """The plan of one MatMul, and the configuration as the builder left it."""
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float32, (2, 4))
    weight = np.ones((4, 8), np.float32)
    w = network.add_constant((4, 8), trt.Weights(weight)).get_output(0)
    kind = trt.MatrixOperation.NONE
    network.mark_output(network.add_matrix_multiply(x, kind, w, kind).get_output(0))
    config = builder.create_builder_config()
    configure(config)
    plan = builder.build_serialized_network(network, config)
    return (None if plan is None else bytes(memoryview(plan))), config


def _flag(name: str) -> Callable[[Any], None]:
    return lambda config: config.set_flag(getattr(trt.BuilderFlag, name))


def test_weight_streaming_builds_ahead_of_time():
    plain, _ = _build(lambda config: None)
    streamed, config = _build(_flag("WEIGHT_STREAMING"))
    assert streamed is not None
    assert streamed != plain
    assert config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)


def test_version_compatible_does_not_build_for_want_of_a_lean_runtime():
    assert _build(_flag("VERSION_COMPATIBLE"))[0] is None


@pytest.mark.skipif(gpu_present(), reason="not known with a GPU")
@pytest.mark.parametrize("name", ["REFIT", "STRIP_PLAN"])
def test_refit_does_not_build_without_a_gpu(name: str):
    assert _build(_flag(name))[0] is None


@pytest.mark.parametrize("name", ["AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"])
def test_the_level_of_hardware_compatibility_stays_none(name: str):
    def configure(config: Any) -> None:
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, name)

    plan, config = _build(configure)
    assert plan is not None
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.NONE


@pytest.mark.parametrize("name", ["NONE", "FAST", "MODERATE", "FULL"])
def test_tiling_levels_are_taken(name: str):
    def configure(config: Any) -> None:
        config.tiling_optimization_level = getattr(trt.TilingOptimizationLevel, name)

    plan, config = _build(configure)
    assert plan is not None
    assert config.tiling_optimization_level == getattr(trt.TilingOptimizationLevel, name)


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_a_corrupt_timing_cache_becomes_an_empty_one_without_an_error():
    config = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR)).create_builder_config()
    made, empty = (bytes(memoryview(config.create_timing_cache(data).serialize())) for data in (b"garbage", b""))
    assert made == empty
