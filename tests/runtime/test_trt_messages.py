import pytest

from trtforge.runtime.trt.messages import BuildLog, readable

ERROR, WARNING, VERBOSE = 1, 2, 4
NO_DRIVER = (
    "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
    "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is insufficient for CUDA runtime "
    "version))"
)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            "ITensor::getDimensions: Error Code 4: API Usage Error (m/MatMul#0: 3 is not 4 In validate at /_s/m.cpp:1)",
            "m/MatMul#0: 3 is not 4",
        ),
        (
            "[tactic.cpp::get::48] Error Code 2: Internal Error (nms_0 has no runners In get at /_s/t.cpp:48)",
            "nms_0 has no runners",
        ),
        ("Assertion failed: isValid: the axis is too large", "isValid: the axis is too large"),
        ("plain words (with brackets)", "plain words (with brackets)"),
        (f"first\n{NO_DRIVER}", "first"),
        ("", ""),
    ],
)
def test_readable(raw, said):
    assert readable(raw) == said


def test_driver_noise_goes_only_where_there_is_no_gpu():
    without, with_gpu = BuildLog(True, lambda _: None), BuildLog(False, lambda _: None)
    for log in (without, with_gpu):
        log.take(ERROR, "CUDA initialization failure with error: 35")
        log.take(ERROR, "a real error")
        log.take(ERROR, "a real error")
        log.take(WARNING, "Make sure input i has Int64 binding.")
        log.take(VERBOSE, "a real error")
    assert without.errors == ["a real error"]
    assert with_gpu.errors == ["CUDA initialization failure with error: 35", "a real error"]
    assert without.warnings == []


def test_nodes_are_announced_before_they_are_parsed():
    seen = []
    BuildLog(True, seen.append).take(VERBOSE, "Parsing node: m/Conv#0 [Conv]")
    assert seen == ["m/Conv#0 [Conv]"]


def test_a_profile_that_cannot_hold_is_kept_apart_and_once():
    log = BuildLog(True, lambda _: None)
    for text in ("first", "second"):
        log.take(WARNING, f"Profile kMAX values are not self-consistent. {text} In f at /_src/a.cpp:1")
    assert log.inconsistent == {"max": "first"}
    assert log.warnings == []
