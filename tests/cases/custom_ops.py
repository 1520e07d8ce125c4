"""Two operators of `torch.library`, a model that uses them, and tables of translations, right and wrong."""

from __future__ import annotations

import onnxscript
import torch
from onnxscript import FLOAT
from onnxscript import opset18 as op


@torch.library.custom_op("trtforge_test::swish", mutates_args=())
def swish(x: torch.Tensor, beta: float) -> torch.Tensor:
    return x * torch.sigmoid(beta * x)


@swish.register_fake
def _(x: torch.Tensor, beta: float) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("trtforge_test::root", mutates_args=())
def root(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(min=0).sqrt()


@root.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@onnxscript.script()
def swish_to_onnx(x: FLOAT[...], beta: float) -> FLOAT[...]:
    return op.Mul(x, op.Sigmoid(op.Mul(x, op.CastLike(op.Constant(value_float=beta), x))))


@onnxscript.script()
def unannotated(x, beta: float):
    return op.Mul(x, op.CastLike(op.Constant(value_float=beta), x))


def root_to_onnx(x):
    return op.Sqrt(op.Relu(x))


def raises(x):
    raise KeyError("the translation's own key")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.trtforge_test.swish(self.linear(x), 1.5)
        return torch.ops.trtforge_test.root(y + 1)


def net() -> torch.nn.Module:
    return Net()


table = {"trtforge_test::swish": swish_to_onnx, root: root_to_onnx}
empty: dict[object, object] = {}
raising = {"trtforge_test::swish": swish_to_onnx, "trtforge_test.root.default": raises}
unknown = {"trtforge_test::swich": swish_to_onnx}
number = {"trtforge_test::swish": 3}
untyped = {"trtforge_test::swish": unannotated}
no_dict = [swish_to_onnx]
wrong_translation = {"trtforge_test::swish": swish_to_onnx, "trtforge_test::root": lambda x: op.Relu(x)}
