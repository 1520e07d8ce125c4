"""Networks as torch exports them, quantized, near their float selves, and built by RTX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from trtforge.calibration.placement import quantizable_tensors
from trtforge.calibration.qdq import ORIGIN, insert_qdq
from trtforge.converter.casts import apply_plan
from trtforge.converter.export import export_module
from trtforge.converter.signature import ExampleInputs
from trtforge.runtime.graph import META_MODULE, META_ORIGIN, load_graph, node_refs
from trtforge.runtime.precision import PrecisionPlan
from trtforge.runtime.specs import DimRange, InputSpec
from trtforge.runtime.trt.backend import find_backend

pytestmark = pytest.mark.slow
Call = Callable[..., Any]


class Attention(torch.nn.Module):
    """A pre-norm transformer block as ViT and BERT have it."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.out = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.up, self.down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


def export(module: torch.nn.Module, shape: tuple[int, ...], folder: Path, opset: int) -> Path:
    torch.manual_seed(0)
    spec = InputSpec("x", "float32", ("batch", *shape))
    example = ExampleInputs((torch.randn(2, *shape),), {}, (spec,))
    return export_module(module, example, profiles=({"batch": DimRange(1, 2, 8)},), opset=opset, folder=folder).path


def quantized(model: ir.Model, plan: PrecisionPlan, feeds: dict[str, np.ndarray], max_ranges: Call) -> Any:
    placement = quantizable_tensors(model, plan)
    ranges = max_ranges(model, placement.measured, feeds)
    apply_plan(model, plan)
    return insert_qdq(model, placement, ranges), placement


def sqnr(reference: np.ndarray, candidate: np.ndarray) -> float:
    return float(10 * np.log10((reference**2).sum() / ((reference - candidate) ** 2).sum()))


@pytest.mark.parametrize(
    ("name", "pairs", "adds"),
    # ResNet-18: 20 convolutions read 20 tensors less 3 that a shortcut shares, plus the input of the classifier and 3
    # shortcut outputs; the other 5 skip branches are tensors that a convolution reads anyway.
    [("resnet18", 21, 8), ("mobilenet_v2", 53, 10)],
)
def test_convolutional_networks(
    name: str,
    pairs: int,
    adds: int,
    tmp_path: Path,
    random_feeds: Call,
    run_model: Call,
    max_ranges: Call,
    build_rtx: Call,
) -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    module = getattr(torchvision.models, name)(weights=None)
    # With the running statistics of a fresh network activations vanish: 1e-7 after MobileNetV2's 52 layers.
    with torch.no_grad():
        for _ in range(10):
            module.train()(torch.randn(8, 3, 64, 64))
    path = export(module, (3, 64, 64), tmp_path, opset=20)
    for format, least in (("int8", 20), ("fp8", 12)):
        model = load_graph(path)
        feeds = random_feeds(model)
        reference = run_model(model, feeds)
        report, placement = quantized(model, PrecisionPlan(default=format, base="fp16"), feeds, max_ranges)
        operators = Counter(ref.op for ref in node_refs(model) if ref.id in placement.nodes)
        assert report.pairs == pairs
        assert operators["Add"] == adds
        assert placement.skipped == ()
        ours = [node for node in model.graph if node.metadata_props.get(META_ORIGIN) == ORIGIN]
        assert len(ours) == 2 * report.pairs + report.weights
        assert all(META_MODULE in node.metadata_props for node in ours)
        (output,) = reference
        assert sqnr(reference[output], run_model(model, feeds)[output]) > least
        if format == "fp8" or find_backend("tensorrt-rtx").capabilities.int8_conv:
            build_rtx(model)


def test_a_transformer(tmp_path: Path, random_feeds: Call, run_model: Call, max_ranges: Call, build_rtx: Call) -> None:
    torch.manual_seed(0)
    path = export(torch.nn.Sequential(Attention(), Attention()), (16, 32), tmp_path, opset=22)
    for format, base in (("int8", "fp16"), ("fp8", "fp16"), ("int8", "bf16"), ("fp8", "bf16")):
        model = load_graph(path)
        feeds = random_feeds(model)
        reference = run_model(model, feeds)
        report, placement = quantized(model, PrecisionPlan(default=format, base=base), feeds, max_ranges)
        assert Counter(ref.op for ref in node_refs(model) if ref.id in placement.nodes) == {"MatMul": 12}
        assert report.weights == 8
        if base == "fp16":  # onnxruntime's CPU provider has no bfloat16 MatMul
            (output,) = reference
            assert sqnr(reference[output], run_model(model, feeds)[output]) > 25
        build_rtx(model)
