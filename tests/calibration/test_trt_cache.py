from __future__ import annotations

import math
import struct
from pathlib import Path

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtforge.calibration.placement import Placement, QuantizedTensor, Use
from trtforge.calibration.ranges import Ranges, TensorRange
from trtforge.calibration.trt_cache import TrtCache, ranges_from_trt_cache, read_trt_cache, write_trt_cache
from trtforge.runtime.errors import CalibrationError


def write(path: Path, text: str) -> Path:
    file = path / "calib.cache"
    file.write_bytes(text.encode())
    return file


def chain(*names: str) -> ir.Model:
    """A graph whose tensors have these names, the first being its input."""
    values = [ir.val(names[0], ir.DataType.FLOAT, [1, 4])]
    nodes = []
    for name in names[1:]:
        node = ir.node("Relu", [values[-1]], name=f"Relu#{len(nodes)}")
        node.outputs[0].name = name
        nodes.append(node)
        values.append(node.outputs[0])
    graph = ir.Graph([values[0]], [values[-1]], nodes=nodes, opset_imports={"": 20}, name="chain")
    return ir.Model(graph, ir_version=10)


def test_the_bits_are_big_endian_and_the_scale_is_amax_over_127(tmp_path: Path) -> None:
    cache = read_trt_cache(write(tmp_path, "TRT-100300-EntropyCalibration2\ninput: 3c010a14\nout: 3b810a13\n"))
    assert (cache.version, cache.algorithm) == ("100300", "EntropyCalibration2")
    assert cache.scales["out"] == pytest.approx(0.0039380, abs=5e-8)
    assert cache.scales["input"] == pytest.approx(1 / 127, rel=1e-3)


def test_names_with_separators_windows_line_ends_and_short_hex(tmp_path: Path) -> None:
    cache = read_trt_cache(write(tmp_path, "TRT-8601-MinMaxCalibration\r\na: b: 3f800000\r\nx\u2028y: 1\r\n\r\n"))
    assert list(cache.scales) == ["a: b", "x\u2028y"]
    assert cache.scales["a: b"] == 1.0
    assert cache.scales["x\u2028y"] == 2.0**-149


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "begins with ''"),
        ("input: 3c010a14\n", "begins with 'input: 3c010a14'"),
        ("TRT-100300-EntropyCalibration2\nx: 0\n", "line 2: tensor 'x' has scale 0"),
        ("TRT-100300-EntropyCalibration2\nx: 7f800000\n", "scale inf"),
        ("TRT-100300-EntropyCalibration2\nx: 7fc00000\n", "scale nan"),
        ("TRT-100300-EntropyCalibration2\nx: bf800000\n", "scale -1"),
        ("TRT-100300-EntropyCalibration2\ny: 3f800000\nx 3f800000\n", "line 3: 'x 3f800000' is not"),
        ("TRT-100300-EntropyCalibration2\nx: 13f800000\n", "is not `tensor: hex`"),
        ("TRT-100300-EntropyCalibration2\nx: 3f800000\nx: 40000000\n", "there twice"),
    ],
)
def test_what_is_no_cache_is_named_with_its_line(tmp_path: Path, text: str, wrong: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        read_trt_cache(write(tmp_path, text))
    assert wrong in caught.value.what
    assert caught.value.fix


def test_a_missing_or_binary_file_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot read"):
        read_trt_cache(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"TRT-\xff\xfe")
    with pytest.raises(CalibrationError, match="byte 4 is not text"):
        read_trt_cache(tmp_path / "binary")


def test_the_report_tells_matched_unmatched_unnamed_and_missing() -> None:
    cache = TrtCache(
        "100300", "EntropyCalibration2", {"x": 0.5, "b": 0.25, "gone": 1.0, "(Unnamed Layer* 3) [Shuffle]_output": 2.0}
    )
    placement = Placement(
        tuple(QuantizedTensor(name, measured, "int8", (Use("n", 0),)) for name, measured in [("b", "a"), ("c", "c")])
    )
    ranges, report = ranges_from_trt_cache(cache, chain("x", "a", "b", "c"), placement)
    assert report.matched == ("x", "b")
    assert report.unmatched == ("gone",)
    assert report.unnamed == ("(Unnamed Layer* 3) [Shuffle]_output",)
    assert report.missing == ("c",)
    # "b" is a reordering of "a": one range serves both.
    assert ranges.scales("int8") == {"x": 0.5, "b": 0.25, "a": 0.25}
    assert {found.method for found in ranges.tensors.values()} == {"imported"}


def test_a_cache_of_another_model_is_refused() -> None:
    with pytest.raises(CalibrationError, match="none of the cache's 1 tensors is in the model"):
        ranges_from_trt_cache(TrtCache("100300", "EntropyCalibration2", {"images": 1.0}), chain("x", "y"))


_SCALES = st.floats(min_value=2.0**-126, max_value=2.0**120, width=32)
_NAMES = st.text(min_size=1).filter(lambda name: "\n" not in name and "\r" not in name)


@given(st.dictionaries(_NAMES, _SCALES, min_size=1))
def test_scales_survive_the_round_trip_to_the_bit(tmp_path_factory: pytest.TempPathFactory, scales: dict) -> None:
    path = tmp_path_factory.mktemp("cache") / "calib.cache"
    first = Ranges({name: TensorRange(scale * 127.0, "imported") for name, scale in scales.items()})
    write_trt_cache(first, path, "100300")
    cache = read_trt_cache(path)
    assert cache.scales == scales
    assert list(cache.scales) == list(scales)
    second, report = ranges_from_trt_cache(cache, chain("first input", *scales))
    assert second.scales("int8") == scales
    assert report.unmatched == report.unnamed == report.missing == ()
    write_trt_cache(second, path, "100300")
    assert read_trt_cache(path) == cache


@given(st.integers(0, 2**32 - 1))
def test_every_pattern_of_bits_is_read_exactly_or_refused(tmp_path_factory: pytest.TempPathFactory, bits: int) -> None:
    path = write(tmp_path_factory.mktemp("cache"), f"TRT-1-LegacyCalibration\nx: {bits:x}\n")
    (scale,) = struct.unpack(">f", bits.to_bytes(4, "big"))
    if math.isfinite(scale) and scale > 0:
        assert read_trt_cache(path).scales == {"x": scale}
    else:
        with pytest.raises(CalibrationError, match="has scale"):
            read_trt_cache(path)


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    ranges = Ranges({"a\nb": TensorRange(1.0, "max")})
    with pytest.raises(CalibrationError, match="cannot stand in a calibration cache"):
        write_trt_cache(ranges, tmp_path / "c", "100300")
    with pytest.raises(CalibrationError, match="first line"):
        write_trt_cache(Ranges({}), tmp_path / "c", "10.3.0")
    with pytest.raises(CalibrationError, match="first line"):
        write_trt_cache(Ranges({}), tmp_path / "c", "100300", algorithm="Entropy")
    with pytest.raises(CalibrationError, match="cannot write"):
        write_trt_cache(Ranges({}), tmp_path / "no folder" / "c", "100300")
    assert not list(tmp_path.iterdir())
