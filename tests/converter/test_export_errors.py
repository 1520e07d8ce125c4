"""What a user reads when a model cannot be exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from trtforge.converter.example import example_from_specs
from trtforge.converter.export import export_module
from trtforge.runtime.errors import ConfigError, ExportError
from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.specs import DimRange, InputSpec

DIMS = {"batch": DimRange(1, 4, 8), "seq": DimRange(1, 6, 64)}
X = InputSpec("x", "float32", ("batch", "seq"))

Export = Callable[..., OnnxModel]


@pytest.fixture
def export(tmp_path: Path) -> Export:
    def run(module: nn.Module, *specs: InputSpec, outputs: list[str] | None = None) -> OnnxModel:
        example = example_from_specs(module, specs or (X,), [DIMS])
        return export_module(module, example, profiles=[DIMS], output_names=outputs, opset=20, folder=tmp_path)

    return run


def failure(export: Export, module: nn.Module, *specs: InputSpec) -> ExportError:
    with pytest.raises(ExportError) as caught:
        export(module, *specs)
    assert "site-packages" not in str(caught.value)
    assert "TORCH_LOGS" not in str(caught.value)
    return caught.value


class Branch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return x


def test_a_branch_on_values_is_explained_at_its_line(export: Export) -> None:
    error = failure(export, Branch())
    assert "test_export_errors.py:" in error.what
    assert "`if x.sum() > 0:`" in error.what
    assert "torch.where" in error.fix
    assert "torch.cond" in error.fix
    assert error.__cause__ is not None


class Item(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = int(x.sum().item())
        return x[:n]


def test_a_number_taken_from_a_tensor(export: Export) -> None:
    error = failure(export, Item())
    assert "`n = int(x.sum().item())`" in error.what


class Chunk(nn.Module):
    """RAFT's way with two stacked images; torch.onnx.export alone freezes the batch without a word."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = torch.chunk(x, 2, dim=0)
        return a + b


def test_a_chunk_of_the_batch_freezes_it(export: Export) -> None:
    error = failure(export, Chunk())
    assert error.what.startswith("dimension 'batch' froze at 4, at ")
    assert "`a, b = torch.chunk(x, 2, dim=0)`" in error.what


class Join(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, y], 1)


def test_an_input_whose_shape_was_forgotten_is_named(export: Export) -> None:
    error = failure(export, Join(), X, InputSpec("y", "float32", (4, 5)))
    assert error.what.startswith("dimension 'batch' froze at 4")
    assert error.fix.startswith("if 'batch' is meant there too, name it in the shape of 'y', axis 0; else rewrite it")


class Steps(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [x[:, step] * step for step in range(x.shape[1])]
        return torch.stack(rows, 1)


def test_a_loop_over_a_dimension_freezes_it(export: Export) -> None:
    error = failure(export, Steps())
    assert error.what.startswith("dimension 'seq' froze at 6, at ")
    assert "for step in range(x.shape[1])" in error.what


class Sum(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def test_two_names_for_one_dimension(export: Export) -> None:
    x, y = InputSpec("x", "float32", ("batch", 4)), InputSpec("y", "float32", ("seq", 4))
    error = failure(export, Sum(), x, y)
    assert "dimensions 'seq' and 'batch' are always equal" in error.what
    assert "'batch' in place of 'seq'" in error.fix


class Threshold(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 3:
            return x * 2
        return x


def test_a_branch_on_a_size_narrows_the_range(export: Export) -> None:
    error = failure(export, Threshold())
    assert "dimension 'batch' was asked to be 1 to 8, the captured code holds for 4 to 8" in error.what
    assert "`if x.shape[0] > 3:`" in error.what
    assert "[4, 8]" in error.fix


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("kaputt")


def test_the_users_own_error_is_kept(export: Export) -> None:
    error = failure(export, Raises())
    assert "ValueError: kaputt" in error.what
    assert '`raise ValueError("kaputt")`' in error.what
    assert isinstance(error.__cause__, ValueError)
    assert error.__cause__.__traceback__ is not None


class ThroughNumpy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(x.numpy()) * 2)


def test_values_that_leave_torch(export: Export) -> None:
    error = failure(export, ThroughNumpy())
    assert "x.numpy()" in error.what
    assert "torch operators" in error.fix


class Missing(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.linalg.svdvals(x)
        return values, torch.special.bessel_j0(x)


def test_all_missing_operators_are_in_one_list(export: Export) -> None:
    error = failure(export, Missing())
    lines = error.what.splitlines()
    assert lines[0] == "2 operators have no translation to ONNX:"
    assert "svd" in lines[1]
    assert "bessel_j0" in lines[2]
    assert all("test_export_errors.py:" in line for line in lines[1:])


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> None:
        return None


def test_no_output(export: Export) -> None:
    assert "returned no tensor" in failure(export, Nothing()).what


class Opaque(nn.Module):
    def forward(self, x: torch.Tensor) -> object:
        return {"a": x, "b": object()}


def test_an_output_of_an_unknown_type_is_named(export: Export) -> None:
    error = failure(export, Opaque())
    assert "b is a builtins.object" in error.what


@pytest.mark.parametrize("names", [["a", "b"], []])
def test_another_number_of_output_names(export: Export, names: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"outputs names . tensors, the model returns 1: output"):
        export(nn.ReLU(), InputSpec("input", "float32", (2,)), outputs=names)


def test_an_output_name_twice_or_an_inputs(export: Export) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, x + 2

    with pytest.raises(ConfigError, match="'a' twice"):
        export(Two(), outputs=["a", "a"])
    with pytest.raises(ConfigError, match="'x' is an input's name"):
        export(Two(), outputs=["x", "y"])


def test_a_failed_export_leaves_the_module_as_it_was(export: Export) -> None:
    module = Branch().train()
    failure(export, module)
    assert module.training
