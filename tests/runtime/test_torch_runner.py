from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from trtforge.runtime.errors import ExportError, ParityError
from trtforge.runtime.specs import TensorSpec
from trtforge.runtime.torch_runner import TorchRunner, evaluation, from_torch, to_torch

X = TensorSpec("x", "float32", ("batch", 4))
Y = TensorSpec("y", "float32", ("batch", 4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        return self.drop(self.linear(x))


def runner(module: nn.Module) -> TorchRunner:
    return TorchRunner(module, lambda x: [module(x)], [X], [Y])


def test_results_are_those_of_the_module_in_eval_mode_and_repeatable() -> None:
    module = Net().train()
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = runner(module).run({"x": x}), runner(module).run({"x": x})
    np.testing.assert_array_equal(first["y"], second["y"])
    expected = x @ module.linear.weight.detach().numpy().T + module.linear.bias.detach().numpy()
    np.testing.assert_allclose(first["y"], expected, rtol=1e-5, atol=1e-6)
    assert module.training
    assert module.drop.training


def test_nothing_is_aliased() -> None:
    module = nn.Identity()
    x = np.ones((1, 4), np.float32)
    y = runner(module).run({"x": x})["y"]
    y += 1
    np.testing.assert_array_equal(x, np.ones((1, 4), np.float32))


@pytest.fixture
def tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    yield
    matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
def test_tf32_is_off_while_it_runs_and_as_it_was_afterwards() -> None:
    seen = []

    class Look(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return x

    runner(Look()).run({"x": np.ones((1, 4), np.float32)})
    assert seen == ["ieee"]
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_a_module_that_fails_is_named_with_its_sizes() -> None:
    with pytest.raises(ExportError, match=r"the PyTorch model itself fails on inputs of sizes x \[2, 5\]") as caught:
        runner(Net()).run({"x": np.ones((2, 5), np.float32)})
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_another_number_of_outputs() -> None:
    broken = TorchRunner(Net(), lambda x: [x, x], [X], [Y])
    with pytest.raises(ParityError, match="returned 2 tensors, the exported graph has 1"):
        broken.run({"x": np.ones((1, 4), np.float32)})


def test_a_missing_input() -> None:
    with pytest.raises(KeyError, match="x"):
        runner(Net()).run({})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_arrays_go_there_and_back(dtype: str) -> None:
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    array = np.array([[0, 1], [1, 0]], dtype=kind)[:, ::-1]
    tensor = to_torch(array)
    assert str(tensor.dtype) == f"torch.{dtype}"
    back = from_torch(tensor)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_evaluation_puts_each_flag_back() -> None:
    module = Net().train()
    module.drop.eval()
    with evaluation(module):
        assert not module.linear.training
    assert (module.training, module.linear.training, module.drop.training) == (True, True, False)
