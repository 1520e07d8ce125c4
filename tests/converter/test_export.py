"""Modules to ONNX: names, dimensions, dtypes and structures as the user wrote them, results as PyTorch's."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from trtforge.converter.dims import merge_profiles
from trtforge.converter.example import example_from_inputs, example_from_specs
from trtforge.converter.export import FlatCall, export_module
from trtforge.converter.signature import ExampleInputs
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.graph import OnnxModel, load_graph
from trtforge.runtime.inputs import make_inputs
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.specs import DimRange, InputSpec, TensorSpec, ValueRange, profile_points
from trtforge.runtime.torch_runner import TorchRunner

BATCH = {"batch": DimRange(1, 4, 8)}
BOTH = {"batch": DimRange(1, 4, 8), "seq": DimRange(1, 6, 16)}


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., OnnxModel]:
    """Exports a call, compares onnxruntime with torch at min, opt and max, and returns the model."""

    def run(
        module: nn.Module, example: ExampleInputs, dims: Mapping[str, DimRange] | None = None, **options: Any
    ) -> OnnxModel:
        profiles = [dims] if dims else []
        options = {"opset": 20, "folder": tmp_path} | options
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            model = export_module(module, example, profiles=profiles, **options)
        assert printed.getvalue() == ""
        assert [(spec.name, spec.dtype, spec.shape) for spec in model.inputs] == [
            (spec.name, spec.dtype, spec.shape) for spec in example.specs
        ]
        runner = TorchRunner(module, FlatCall(module, example), model.inputs, model.outputs)
        session = OnnxRuntimeRunner(model.path)
        for sizes in profile_points(dims or {}).values():
            feeds = make_inputs(example.specs, sizes, 1)
            expected = runner.run(feeds)
            found = session.run(feeds)
            assert list(found) == list(expected)
            for name, array in expected.items():
                assert array.dtype == found[name].dtype
                np.testing.assert_allclose(array, found[name], rtol=2e-4, atol=2e-5, err_msg=f"{name} at {sizes}")
        return model

    return run


Check = Callable[..., OnnxModel]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_from_specs(check: Check) -> None:
    module = Mlp()
    model = check(module, example_from_specs(module, [InputSpec("x", "float32", ("batch", 4))], [BATCH]), BATCH)
    assert model.inputs == (TensorSpec("x", "float32", ("batch", 4)),)
    assert model.outputs == (TensorSpec("output", "float32", ("batch", 3)),)
    assert model.opset == 20


def test_from_the_users_tensors_even_at_batch_1(check: Check) -> None:
    module = Mlp()
    for inputs in (torch.ones(1, 4), (torch.ones(1, 4),), [torch.ones(1, 4)], {"x": torch.ones(1, 4)}):
        example = example_from_inputs(module, inputs, profiles=[BATCH], shapes={"x": ("batch", 4)})
        assert example.tensors[0].shape == (2, 4)
    model = check(module, example, BATCH, output_names=["logits"])
    assert model.outputs == (TensorSpec("logits", "float32", ("batch", 3)),)


def test_without_dims_all_is_static(check: Check) -> None:
    module = Mlp()
    model = check(module, example_from_inputs(module, torch.ones(3, 4)))
    assert model.inputs[0].shape == (3, 4)


def test_a_range_of_one_size_is_static(check: Check) -> None:
    module = Mlp()
    dims = {"batch": DimRange(1, 1, 1)}
    model = check(module, example_from_specs(module, [InputSpec("x", "float32", ("batch", 4))], [dims]), dims)
    assert model.inputs[0].shape == (1, 4)


def test_several_profiles_are_covered() -> None:
    profiles = [{"batch": DimRange(1, 1, 1)}, {"batch": DimRange(8, 16, 32)}]
    example = example_from_specs(Mlp(), [InputSpec("x", "float32", ("batch", 4))], profiles)
    assert example.specs[0].shape == ("batch", 4)
    assert merge_profiles(profiles) == {"batch": DimRange(1, 1, 32)}


def test_the_module_is_left_as_it_was(check: Check) -> None:
    module = Mlp().train()
    module.layers[0].eval()
    module.layers[0].weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    check(module, example_from_inputs(module, torch.ones(2, 4)))
    assert module.training
    assert not module.layers[0].training
    assert module.layers[3].training
    assert [p.requires_grad for p in module.parameters()].count(False) == 1
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    assert next(iter(dict(module.named_modules()))) == ""


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@dataclass
class Options:
    scale: torch.Tensor
    name: str = "a"
    bias: torch.Tensor | None = None


@dataclass
class Result:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, torch.Tensor]
    loss: torch.Tensor | None = None


class Nested(nn.Module):
    def forward(
        self,
        batch: dict[str, torch.Tensor],
        pair: tuple[torch.Tensor, torch.Tensor],
        options: Options,
        flag: bool = True,
        *,
        extra: torch.Tensor | None = None,
    ) -> Result:
        x = batch["ids"].float() * options.scale
        if extra is not None:
            x = x + extra
        if flag:
            x = -x
        assert options.bias is None
        return Result(x.masked_fill(batch["mask"], 0.0), (pair[0] + 1, pair[1] * x))


def test_nested_inputs_and_dataclass_outputs(check: Check) -> None:
    example = example_from_inputs(
        Nested(),
        {
            "batch": {"ids": torch.randint(0, 9, (2, 3)), "mask": torch.tensor([[True, False, True]] * 2)},
            "pair": (torch.rand(2, 3), torch.rand(2, 3)),
            "options": Options(torch.rand(3)),
            "flag": False,
            "extra": torch.rand(2, 3),
        },
        profiles=[BATCH],
        shapes=dict.fromkeys(("batch.ids", "batch.mask", "pair.0", "pair.1", "extra"), ("batch", 3)),
    )
    model = check(Nested(), example, BATCH)
    assert [spec.name for spec in model.inputs] == [
        "batch.ids", "batch.mask", "pair.0", "pair.1", "options.scale", "extra",
    ]  # fmt: skip
    assert [spec.dtype for spec in model.inputs] == ["int64", "bool", "float32", "float32", "float32", "float32"]
    assert [spec.name for spec in model.outputs] == ["logits", "hidden.0", "hidden.1"]


def test_nested_inputs_from_specs(check: Check) -> None:
    class Plain(nn.Module):
        def forward(self, batch: dict[str, torch.Tensor], pair: tuple[torch.Tensor, ...]) -> dict[str, Any]:
            return {"sum": batch["a"] + pair[0], "rest": [pair[1], batch["a"] * 2]}

    specs = [InputSpec(name, "float32", ("batch", 2)) for name in ("pair.1", "pair.0", "batch.a")]
    model = check(Plain(), example_from_specs(Plain(), specs, [BATCH]), BATCH)
    assert [spec.name for spec in model.outputs] == ["sum", "rest.0", "rest.1"]


def test_a_dict_as_last_positional_argument_is_one_input(check: Check) -> None:
    class Last(nn.Module):
        def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> Pair:
            return Pair(x + more["y"], x)

    example = example_from_inputs(Last(), (torch.ones(2, 3), {"y": torch.ones(2, 3)}))
    model = check(Last(), example)
    assert [spec.name for spec in model.inputs] == ["x", "more.y"]
    assert [spec.name for spec in model.outputs] == ["left", "right"]


def test_variadic_parameters(check: Check) -> None:
    class Many(nn.Module):
        def forward(self, *xs: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, int, None, torch.Tensor]:
            return sum(xs[1:], xs[0]), 3, None, named["z"] * 2

    shape = ("batch", 2)
    specs = [InputSpec(name, "float32", shape) for name in ("xs.0", "xs.1", "z")]
    model = check(Many(), example_from_specs(Many(), specs, [BATCH]), BATCH)
    assert [spec.name for spec in model.inputs] == ["xs.0", "xs.1", "z"]
    assert [spec.name for spec in model.outputs] == ["output_0", "output_3"]


def test_several_and_shared_dynamic_dimensions(check: Check) -> None:
    class Attend(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            scores = (q @ k.transpose(1, 2)).masked_fill(~mask[:, None, :], -1e9)
            return torch.softmax(scores, -1) @ k

    dims = {"batch": DimRange(1, 4, 8), "queries": DimRange(1, 4, 9), "keys": DimRange(1, 4, 9)}
    specs = [
        InputSpec("q", "float32", ("batch", "queries", 4)),
        InputSpec("k", "float32", ("batch", "keys", 4)),
        InputSpec("mask", "bool", ("batch", "keys"), ValueRange(1, 1)),
    ]
    example = example_from_specs(Attend(), specs, [dims])
    assert len({size for tensor in example.tensors[:2] for size in tensor.shape[:2]}) == 3
    model = check(Attend(), example, dims)
    assert model.outputs[0].shape == ("batch", "queries", 4)


def test_an_unused_input_stays_an_input(check: Check) -> None:
    class Unused(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x * 2

    specs = [InputSpec("x", "float32", ("batch", 2)), InputSpec("y", "int64", ("batch", 3))]
    check(Unused(), example_from_specs(Unused(), specs, [BATCH]), BATCH)


def test_outputs_that_are_inputs_weights_or_the_same_value(check: Check) -> None:
    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = x * 2
            return {"x": x, "a": y, "b": y, "weight": self.weight, "n": torch.zeros(2)}

    model = check(Same(), example_from_inputs(Same(), torch.rand(2, 3)))
    assert [spec.name for spec in model.outputs] == ["x_output", "a", "b", "weight", "n"]


def test_names_that_values_of_the_graph_have(check: Check) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    example = example_from_inputs(module, torch.rand(2, 3))
    assert [spec.name for spec in example.specs] == ["input"]
    check(module, example, output_names=["0.weight"])


def test_derived_sizes(check: Check) -> None:
    class Shapes(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.cat([x, x], 1), x.reshape(x.shape[0] * x.shape[1], -1)

    specs = [InputSpec("x", "float32", ("batch", "seq", 2))]
    model = check(Shapes(), example_from_specs(Shapes(), specs, [BOTH]), BOTH)
    assert model.outputs[0].shape == ("batch", "2*seq", 2)
    assert model.outputs[1].shape[0] in ("batch*seq", "seq*batch")


def test_an_lstms_length_stays_dynamic_in_what_the_graph_declares(check: Check) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 5, batch_first=True, bidirectional=True)
            self.head = nn.Linear(10, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y, _ = self.lstm(x)
            return self.head(y), torch.arange(y.shape[1])

    specs = [InputSpec("x", "float32", ("batch", "seq", 4))]
    module = Tagger()
    model = check(module, example_from_specs(module, specs, [BOTH]), BOTH)
    assert model.outputs[0].shape == ("batch", "seq", 3)
    assert model.outputs[1].shape == ("seq",)
    assert "LSTM" in {node.op_type for node in load_graph(model.path).graph}


def test_prelu_scatter_and_padding(check: Check) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.prelu = nn.PReLU(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.prelu(self.conv(nn.functional.pad(x, (1, 0, 0, 1))))
            y = y.new_zeros(y.shape).index_copy(2, torch.tensor([1]), y[:, :, :1]) + y
            y[:, 0, 0] = 1.0
            return y

    module = Mixed()
    check(module, example_from_specs(module, [InputSpec("x", "float32", ("batch", 3, 6, 6))], [BATCH]), BATCH)


def test_element_types(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            return {f"{name}_twice": x + x for name, x in inputs.items()}

    names = ["float16", "bfloat16", "float64", "int32", "uint8", "int8"]
    example = example_from_specs(Twice(), [InputSpec(name, name, ("batch", 2)) for name in names], [BATCH])
    model = export_module(Twice(), example, profiles=[BATCH], opset=20, folder=tmp_path)
    assert [spec.dtype for spec in model.inputs] == [spec.dtype for spec in model.outputs] == names
    runner = TorchRunner(Twice(), FlatCall(Twice(), example), model.inputs, model.outputs)
    feeds = make_inputs(example.specs, {"batch": 3}, 0)
    found = runner.run(feeds)
    for name in names:
        assert found[f"{name}_twice"].dtype == feeds[name].dtype
        assert (found[f"{name}_twice"] == feeds[name] + feeds[name]).all()


@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(check: Check, opset: int) -> None:
    class Attention(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k * 2)

    specs = [InputSpec(name, "float32", ("batch", 2, "seq", 8)) for name in ("q", "k")]
    model = check(Attention(), example_from_specs(Attention(), specs, [BOTH]), BOTH, opset=opset)
    assert model.opset == opset
    operators = {node.op_type for node in load_graph(model.path).graph}
    assert ("Attention" in operators) == (opset >= 23)


def test_values_seen_in_the_example_are_legal_to_generate() -> None:
    class Ids(nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return ids * mask * x

    example = example_from_inputs(Ids(), (torch.tensor([[7, 3]]), torch.ones(1, 2, dtype=torch.bool), torch.rand(1, 2)))
    assert [spec.values for spec in example.specs] == [ValueRange(3, 7), ValueRange(1, 1), None]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([InputSpec("y", "float32", (2, 4))], r"no parameter 'y'"),
        ([], r"requires 'x'"),
        ([InputSpec("x", "float32", ("rows", 4))], r"'rows', which has no range"),
        ([InputSpec("x", "float31", (2, 4))], r"'float31' is not one of"),
        ([InputSpec("x", "float32", (2, 4)), InputSpec("x.a", "float32", (2, 4))], r"below an input"),
        ([InputSpec("x", "int8", (2, 4), ValueRange(0, 300))], r"do not fit int8"),
    ],
)
def test_specs_that_fit_no_call(specs: list[InputSpec], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        example_from_specs(Mlp(), specs, [BATCH])


@pytest.mark.parametrize(
    ("inputs", "shapes", "message"),
    [
        ((torch.ones(2, 4), torch.ones(1)), {}, "does not take these example inputs"),
        ({"y": torch.ones(2, 4)}, {}, "does not take these example inputs"),
        (torch.ones(2, 4), {"y": ("batch", 4)}, "'y', which is not an input"),
        (torch.ones(2, 4), {"x": ("batch",)}, "does not fit the example's"),
        (torch.ones(2, 4), {"x": ("batch", 5)}, "axis 1 is 5 in its shape and 4 in its example"),
        (torch.ones(2, 4), {"x": ("rows", 4)}, "dimension 'rows' has no range"),
        (torch.ones(9, 4), {"x": ("batch", 4)}, r"size 9, outside of 'batch' = \[1, 8\]"),
        (torch.ones(2, 4), {}, "dimension 'batch' is in no input's shape"),
        (torch.ones(2, 4, dtype=torch.complex64), {"x": ("batch", 4)}, "is complex64"),
        (object(), {}, "holds no known tensors"),
    ],
)
def test_inputs_that_fit_no_call(inputs: Any, shapes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        example_from_inputs(Mlp(), inputs, profiles=[BATCH], shapes=shapes)


def test_one_dimension_of_two_sizes() -> None:
    with pytest.raises(ConfigError, match="'batch' has size 3 in the example of 'input2' and 2 in that of 'input1'"):
        example_from_inputs(
            nn.Bilinear(2, 2, 2),
            (torch.ones(2, 2), torch.ones(3, 2)),
            profiles=[BATCH],
            shapes={"input1": ("batch", 2), "input2": ("batch", 2)},
        )


def test_dimensions_with_sympys_names(check: Check) -> None:
    dims = {"N": DimRange(1, 4, 8), "S": DimRange(1, 4, 8), "E": DimRange(1, 4, 8)}
    module = nn.Softmax(-1)
    model = check(module, example_from_specs(module, [InputSpec("input", "float32", ("N", "S", "E"))], [dims]), dims)
    assert model.outputs[0].shape == ("N", "S", "E")


def test_a_reshape_of_attention(check: Check) -> None:
    """T5's: torch chose one attention kernel when it captured and another, of other strides, when it translated."""

    class Heads(nn.Module):
        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            q = x.view(*x.shape[:2], 2, 4).transpose(1, 2)
            y = nn.functional.scaled_dot_product_attention(q, q * 2, q * 3, attn_mask=bias)
            return y.transpose(1, 2).reshape(*x.shape[:2], -1)

    specs = [InputSpec("x", "float32", ("batch", "seq", 8)), InputSpec("bias", "float32", (1, 2, "seq", "seq"))]
    check(Heads(), example_from_specs(Heads(), specs, [BOTH]), BOTH)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_torchscript_is_refused() -> None:
    script = torch.jit.script(nn.ReLU())
    with pytest.raises(ConfigError, match="is TorchScript"):
        example_from_inputs(script, torch.ones(2))


@pytest.mark.parametrize("name", ["batch-size", "", "1"])
def test_a_dimension_that_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError, match="is no name"):
        example_from_specs(Mlp(), [InputSpec("x", "float32", (name, 4))], [{name: DimRange(1, 2, 3)}])


def test_profiles_that_differ_in_their_dimensions() -> None:
    profiles = [{"batch": DimRange(1, 1, 1)}, {"rows": DimRange(1, 1, 1)}]
    with pytest.raises(ConfigError, match="'batch' is in one profile and not in another"):
        example_from_specs(Mlp(), [InputSpec("x", "float32", ("batch", 4))], profiles)
