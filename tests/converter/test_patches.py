"""Patches as products: results, ids and lines, what is left alone, INT8, and a build with TensorRT-RTX."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from onnx_corpus import run_model
from onnx_ir.passes.common import ShapeInferencePass

import trtforge
from trtforge.converter.patches import multiply_patches
from trtforge.runtime.graph import META_LINE, META_MODULE, load_graph

ATTRIBUTES = "kernel_shape = [16, 16], strides = [16, 16]"


def model_of(attributes: str, weight: Any, *, image: str = "n,3,32,48", bias: bool = True) -> onnx.ModelProto:
    inputs = "x, w, b" if bias else "x, w"
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[{image}] x) => (float[n,o,h,w] y) {{ c = Conv<{attributes}>({inputs}) y = Relu(c) }}"""
    )
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    if bias:
        model.graph.initializer.append(numpy_helper.from_array(np.arange(len(weight), dtype=np.float32), "b"))
    return model


def rewritten(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(copy.deepcopy(proto))
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    multiply_patches(model)
    return model


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_results_are_equal_for_any_batch(bias: bool) -> None:
    proto = model_of(ATTRIBUTES, normal(5, 3, 16, 16), bias=bias)
    model = rewritten(proto)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert Counter(node.op_type for node in model.graph)["Conv"] == 0
    for batch in (1, 3):
        feeds = {"x": normal(batch, 3, 32, 48)}
        np.testing.assert_allclose(run_model(model, feeds)["y"], run_model(proto, feeds)["y"], atol=1e-4)
    before = str(model)
    multiply_patches(model)
    assert str(model) == before


@pytest.mark.parametrize(
    ("attributes", "weight", "image"),
    [
        ("kernel_shape = [16, 16], strides = [8, 8]", (5, 3, 16, 16), "n,3,32,48"),  # they overlap
        ("kernel_shape = [16, 16], strides = [16, 16], pads = [8, 0, 8, 0]", (5, 3, 16, 16), "n,3,32,48"),
        ("kernel_shape = [8, 8], strides = [16, 16], dilations = [2, 2]", (5, 3, 8, 8), "n,3,32,48"),
        (ATTRIBUTES, (5, 3, 16, 16), "n,3,32,50"),  # a rest that no patch reads
        (ATTRIBUTES, (5, 3, 16, 16), "n,3,height,48"),
        ("kernel_shape = [4, 4], strides = [4, 4]", (5, 3, 4, 4), "n,3,32,48"),  # too small to be worth it
        ("kernel_shape = [16, 16], strides = [16, 16], group = 2", (4, 2, 16, 16), "n,4,32,48"),
        ("kernel_shape = [8, 8], strides = [8, 8]", (5, 64, 8, 8), "n,64,32,48"),
    ],
)
def test_others_stay(attributes: str, weight: tuple[int, ...], image: str) -> None:
    model = rewritten(model_of(attributes, normal(*weight), image=image))
    assert [node.op_type for node in model.graph] == ["Conv", "Relu"]


class Patches(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Conv2d(3, 32, 16, 16)
        self.head = torch.nn.Linear(32, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(torch.nn.functional.gelu(tokens))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_vision_transformers_first_layer(precision: str, tmp_path: Path) -> None:
    images = [torch.randn(2, 3, 32, 32) for _ in range(4)]
    artifact = trtforge.convert(
        Patches(), images[0], tmp_path / "patches", precision=precision, dims={"batch": (1, 2, 4)},
        inputs={"x": ("batch", 3, 32, 32)}, calibration=images if precision == "int8" else None,
    )  # fmt: skip
    assert artifact.status in ("built", "validated")
    graph = load_graph(artifact.path / "reference.onnx")
    assert "Conv" not in {node.op_type for node in graph.graph}
    (product,) = (node for node in graph.graph if node.name == "embed/MatMul#0")
    assert product.metadata_props[META_MODULE] == "embed"
    assert "test_patches.py" in product.metadata_props[META_LINE]
    if precision == "int8":
        quantized = load_graph(artifact.path / "model.onnx").graph
        (product,) = (node for node in quantized if node.name == "embed/MatMul#0")
        assert [value.producer().op_type for value in product.inputs] == ["DequantizeLinear"] * 2
