from __future__ import annotations

from pathlib import Path

import onnx.parser
import pytest

from trtforge.runtime.trt.build import BuildRequest, build_engine

pytest.importorskip("tensorrt_rtx", reason="builds without a GPU")


@pytest.mark.parametrize("width", [8, 16])  # there is no fused kernel for heads of 8
@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_attention_builds_in_every_float_type(dtype: str, width: int, tmp_path: Path) -> None:
    kind = f"{dtype}[n, 2, 8, {width}]"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 23]> g ({kind} q, {kind} k, {kind} v) => ({kind} y)'
        "{ y = Attention(q, k, v) }"
    )
    onnx.save(model, tmp_path / "m.onnx")
    shapes = dict.fromkeys("qkv", ((1, 2, 8, width), (2, 2, 8, width), (4, 2, 8, width)))
    engine = build_engine(
        BuildRequest(tmp_path / "m.onnx", tmp_path / "m.engine", "tensorrt-rtx", (shapes,), tf32=False)
    )
    assert engine.size_bytes > 0
