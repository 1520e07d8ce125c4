from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from onnx_corpus import CORPUS, Case, run_model
from torch import nn

from trtforge.converter.cleanup import clean
from trtforge.converter.example import example_from_inputs
from trtforge.converter.export import export_module
from trtforge.converter.identity import identify
from trtforge.runtime.graph import META_LINE, META_MODULE, all_graphs, graph_hash, load_graph, node_refs


def nodes_of(model: ir.Model) -> list[ir.Node]:
    return [node for graph in all_graphs(model) for node in graph]


def identified(case: Case) -> ir.Model:
    model = case.ir()
    clean(model)
    identify(model)
    return model


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_ids_are_unique_stable_and_leave_the_graph_as_it_is(case: Case) -> None:
    plain = case.ir()
    clean(plain)
    model = identified(case)
    names = [node.name for node in nodes_of(model)]
    assert all(names)
    assert len(names) == len(set(names))
    assert graph_hash(model) == graph_hash(plain)
    identify(model)
    assert [node.name for node in nodes_of(model)] == names
    feeds = case.feeds(2)
    assert list(run_model(model, feeds)) == list(case.expected(2))


def test_foreign_nodes_keep_their_unique_names() -> None:
    model = identified(next(case for case in CORPUS if case.name == "nested_bodies"))
    assert [node.name for node in nodes_of(model)] == [
        "n2", "n2_body_0", "n2_body_2", "n2_body_3",
        "n2_body_3_then_branch_0", "n2_body_3_else_branch_0", "n2_body_3_else_branch_1",
    ]  # fmt: skip
    assert {ref.module for ref in node_refs(model)} == {""}


def test_foreign_nodes_without_a_name_of_their_own_are_counted() -> None:
    unnamed = identified(next(case for case in CORPUS if case.name == "unnamed"))
    assert [node.name for node in nodes_of(unnamed)] == ["/MatMul#0", "/Relu#0", "/MatMul#1", "/Relu#1"]
    doubled = identified(next(case for case in CORPUS if case.name == "duplicate_names"))
    assert [node.name for node in nodes_of(doubled)] == ["layer", "/Relu#0", "/MatMul#0", "last"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.relu(self.linear(x)) + x)


class Net(nn.Module):
    def __init__(self, *, stem: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(stem)], nn.BatchNorm2d(3), nn.ReLU())
        self.blocks = nn.ModuleList(Block(4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(1)[:, :4]
        for block in self.blocks:
            x = block(x)
        return x


Export = Callable[[nn.Module, torch.Tensor], ir.Model]


@pytest.fixture
def export(tmp_path: Path) -> Export:
    def run(module: nn.Module, x: torch.Tensor) -> ir.Model:
        example = example_from_inputs(module, x)
        return load_graph(export_module(module, example, opset=20, folder=tmp_path).path)

    return run


def test_torch_nodes_are_called_after_their_modules(export: Export) -> None:
    model = export(Net(), torch.ones(2, 3, 4, 4))
    names = {str(node.name) for node in nodes_of(model)}
    assert {"stem.0/Conv#0", "stem.2/Relu#0", "blocks.0.linear/Gemm#0", "blocks.1/Relu#0", "blocks.1/Add#0"} <= names
    assert "blocks.1.norm/LayerNormalization#0" in names
    for node in nodes_of(model):
        assert str(node.name).startswith(f"{node.metadata_props[META_MODULE]}/{node.op_type}#")
        assert set(node.metadata_props) <= {META_MODULE, META_LINE}


def test_a_layer_more_at_the_stem_leaves_other_ids_alone(export: Export) -> None:
    before = {str(node.name) for node in nodes_of(export(Net(), torch.ones(2, 3, 4, 4)))}
    after = {str(node.name) for node in nodes_of(export(Net(stem=2), torch.ones(2, 3, 4, 4)))}
    assert {name for name in before if name.startswith("blocks")} <= after


def test_the_line_is_the_users(export: Export) -> None:
    model = export(Net(), torch.ones(2, 3, 4, 4))
    lines = {str(node.name): node.metadata_props[META_LINE] for node in nodes_of(model)}
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    file, _, number = lines["blocks.1.linear/Gemm#0"].rpartition(":")
    assert Path(file).name == Path(__file__).name
    assert not Path(file).is_absolute()
    assert "torch.relu(self.linear(x)) + x" in source[int(number) - 1]


def test_a_module_called_twice_counts_on(export: Export) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).tanh())

    names = [node.name for node in nodes_of(export(Twice(), torch.ones(2, 4)))]
    assert names == ["layer/Gemm#0", "/Tanh#0", "layer/Gemm#1"]


def test_branches_of_cond_have_ids_too(export: Export) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda y: self.layer(y), lambda y: y * 2, (x,))

    model = export(Branches(), torch.ones(2, 4))
    names = [str(node.name) for node in nodes_of(model)]
    assert any(node.op_type == "If" for node in model.graph)
    assert any(name.startswith("layer/") for name in names)
    assert len(names) == len(set(names))


def test_a_bare_layer_as_the_model_has_the_empty_path(export: Export) -> None:
    assert [node.name for node in nodes_of(export(nn.Linear(4, 4), torch.ones(2, 4)))] == ["/Gemm#0"]
