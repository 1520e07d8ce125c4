"""Facts about torch's exporter and onnx-ir that shape converter/export.py, cleanup.py, foreign.py and identity.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import pytest
import torch
from onnx_corpus import CORPUS
from onnx_ir.passes.common import IdentityEliminationPass
from torch import nn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def export(module: nn.Module, x: torch.Tensor, shapes: dict[int, torch.export.Dim], **options: int) -> ir.Model:
    program = torch.onnx.export(
        module.eval(), (x,), dynamo=True, dynamic_shapes=(shapes,), verbose=False, **({"opset_version": 20} | options)
    )
    assert program is not None
    return program.model


def test_the_exporter_freezes_a_chunked_batch_without_a_word() -> None:
    """Why export.py captures by itself, once, instead of calling `torch.onnx.export` with a module."""

    class Chunk(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = torch.chunk(x, 2, dim=0)
            return a + b

    model = export(Chunk(), torch.ones(4, 3), {0: torch.export.Dim("batch", min=1, max=8)})
    shape = model.graph.inputs[0].shape
    assert shape is not None
    assert shape[0] == 4


@contextlib.contextmanager
def fresh_lstm() -> Iterator[None]:
    torch.ops.aten.lstm.input._dispatch_cache.clear()
    yield
    torch.ops.aten.lstm.input._dispatch_cache.clear()


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


def test_the_exporter_declares_the_examples_length_behind_an_lstm() -> None:
    """Why export.py keeps torch's loops for LSTM and GRU around the translation too."""
    seq = torch.export.Dim("seq", min=1, max=16)
    with fresh_lstm():
        model = export(Tagger(), torch.ones(2, 7, 4), {1: seq})
    declared = model.graph.outputs[0].shape
    assert declared is not None
    assert declared[1] == 7
    assert "LSTM" in {node.op_type for node in model.graph}


def test_a_capture_without_torchs_loops_spoils_a_later_one_with_them() -> None:
    """Why export.py empties the operators' caches before and after."""
    from torch.export._patches import register_lstm_while_loop_decomposition

    shapes = ({1: torch.export.Dim("seq", min=1, max=16)},)
    example = (torch.ones(2, 7, 4),)

    def capture() -> None:
        torch.export.export(Tagger(), example, dynamic_shapes=shapes, strict=False)

    with fresh_lstm():
        with pytest.raises(Exception, match="seq"):
            capture()
        with register_lstm_while_loop_decomposition(), pytest.raises(Exception, match="seq"):
            capture()


def test_onnx_irs_identity_elimination_renames_an_output() -> None:
    """Why cleanup.py has its own."""
    model = next(case for case in CORPUS if case.name == "identities").ir()
    names = [value.name for value in model.graph.outputs]
    IdentityEliminationPass()(model)
    assert [value.name for value in model.graph.outputs] != names


def test_onnxs_converter_drops_what_nodes_carry_and_is_exact() -> None:
    """Why foreign.py copies names and metadata back, by the values that the nodes make."""
    case = next(case for case in CORPUS if case.name == "old_softmax")
    proto = case.proto()
    for node in proto.graph.node:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['']")
    converted = onnx.version_converter.convert_version(proto, 20)
    assert not any(node.metadata_props for node in converted.graph.node)
    session = onnx.reference.ReferenceEvaluator(converted)
    for (name, expected), found in zip(case.expected(2).items(), session.run(None, case.feeds(2)), strict=True):
        np.testing.assert_allclose(expected, found, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_convs_scope_is_the_batch_norm_that_was_folded_into_it() -> None:
    """Why identity.py takes the module of such a node from its weight."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    (node,) = export(module, torch.ones(2, 3, 8, 8), {}).graph
    assert node.op_type == "Conv"
    assert "'1'" in node.metadata_props["pkg.torch.onnx.name_scopes"]
    weight = node.inputs[1]
    assert weight is not None
    assert weight.name == "0.weight"


def test_optimize_fuses_rotary_embeddings_with_a_cache_of_batch_1() -> None:
    """Why export.py exports with `optimize=False` and calls the optimizer, which lacks these fusions, itself."""
    import onnxscript.rewriter.onnx_fusions as fusions

    assert "RotaryEmbedding" in fusions.fuse(
        ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 23}), ir_version=10)
    )
