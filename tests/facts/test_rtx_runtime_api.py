"""What runtime/trt/session.py and context.py take for granted of TensorRT-RTX's Python interface; needs no GPU."""

from __future__ import annotations

import pytest

trt = pytest.importorskip("tensorrt_rtx")


def test_the_runtime_cache_and_the_specialization_strategy_are_set_through_a_runtime_config():
    assert hasattr(trt.ICudaEngine, "create_runtime_config")
    for name in ("create_runtime_cache", "set_runtime_cache", "dynamic_shapes_kernel_specialization_strategy"):
        assert hasattr(trt.IRuntimeConfig, name)
    for name in ("serialize", "deserialize"):
        assert hasattr(trt.IRuntimeCache, name)
    # EAGER: the graph of a shape holds the kernels made for it (runtime/trt/session.py)
    assert {"EAGER", "LAZY", "NONE"} <= set(trt.DynamicShapesKernelSpecializationStrategy.__members__)


def test_contexts_are_created_from_a_runtime_config():
    assert "runtime_config" in trt.ICudaEngine.create_execution_context.__doc__


def test_a_context_says_whether_a_stream_can_be_captured():
    assert "stream" in trt.IExecutionContext.is_stream_capturable.__doc__


def test_a_profiler_is_a_property_of_a_context_and_reports_layer_by_layer():
    assert isinstance(trt.IExecutionContext.profiler, property)
    assert hasattr(trt.IProfiler, "report_layer_time")


def test_the_runtimes_own_graphs_are_off_unless_asked_for():
    # We capture ourselves: its graphs need a third call with the same shapes, and replay on one stream only.
    assert {"DISABLED", "WHOLE_GRAPH_CAPTURE"} == set(trt.CudaGraphStrategy.__members__)
