"""Real architectures through the export: parity with PyTorch at the least, usual and largest sizes, and at batch 1."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from trtforge.converter.example import example_from_specs
from trtforge.converter.export import FlatCall, export_module
from trtforge.runtime.graph import load_graph
from trtforge.runtime.inputs import make_inputs
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.specs import DimRange, InputSpec, Profile, ValueRange, profile_points
from trtforge.runtime.torch_runner import TorchRunner

pytestmark = pytest.mark.slow

BATCH = {"batch": DimRange(1, 2, 4)}
TEXT = {"batch": DimRange(1, 2, 4), "seq": DimRange(1, 6, 16)}


class Encoder(nn.Module):
    """BERT-like: ids and a padding mask, batch and length dynamic."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 32)
        self.positions = nn.Embedding(16, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 7)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        places = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.encoder(self.words(ids) + self.positions(places), src_key_padding_mask=~mask)
        return {"logits": self.head(hidden), "hidden": hidden}


class Tagger(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.layers = kind(8, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)[0])


def vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # it starts at zero, and so would every output
    return model


def maxvit() -> nn.Module:
    return torchvision.models.MaxVit(
        input_size=(64, 64), stem_channels=16, partition_size=2, block_channels=[16], block_layers=[1], head_dim=8,
        stochastic_depth_prob=0.2,
    )  # fmt: skip


@dataclass(frozen=True)
class Model:
    make: Callable[[], nn.Module]
    specs: tuple[InputSpec, ...]
    dims: Profile


def image(make: Callable[[], nn.Module], size: int) -> Model:
    name = next(iter(inspect.signature(make().forward).parameters))
    return Model(make, (InputSpec(name, "float32", ("batch", 3, size, size)),), BATCH)


IDS = InputSpec("ids", "int64", ("batch", "seq"), ValueRange(0, 99))
MASK = InputSpec("mask", "bool", ("batch", "seq"), ValueRange(1, 1))
SEQUENCE = InputSpec("x", "float32", ("batch", "seq", 8))

MODELS: dict[str, Callable[[], Model]] = {
    "resnet18": lambda: image(torchvision.models.resnet18, 64),
    "mobilenet_v2": lambda: image(torchvision.models.mobilenet_v2, 64),
    "vit": lambda: image(vit, 32),
    "maxvit": lambda: image(maxvit, 64),
    "swin_t": lambda: image(torchvision.models.swin_t, 96),
    "encoder": lambda: Model(Encoder, (IDS, MASK), TEXT),
    "lstm": lambda: Model(lambda: Tagger(nn.LSTM), (SEQUENCE,), TEXT),
    "gru": lambda: Model(lambda: Tagger(nn.GRU), (SEQUENCE,), TEXT),
}


def shake_norms(module: nn.Module) -> nn.Module:
    """Statistics as training leaves them: with mean 0 and variance 1 a BatchNorm that goes missing would not show."""
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            assert child.running_mean is not None
            assert child.running_var is not None
            child.running_mean.normal_(0, 0.1)
            child.running_var.uniform_(0.5, 1.5)
    return module.eval()


# Attention is what opset 23 changes.
@pytest.mark.parametrize(("name", "opset"), [*((name, 23) for name in MODELS), ("vit", 20), ("encoder", 20)])
def test_parity_at_every_size(name: str, opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    module = shake_norms(model.make())
    example = example_from_specs(module, model.specs, [model.dims])
    exported = export_module(module, example, profiles=[model.dims], opset=opset, folder=tmp_path)
    assert [(spec.name, spec.shape) for spec in exported.inputs] == [(spec.name, spec.shape) for spec in model.specs]
    assert all(spec.shape[0] == "batch" for spec in exported.outputs)
    names = [str(node.name) for node in load_graph(exported.path).graph]
    assert len(names) == len(set(names))
    assert not any(name.startswith("node_") for name in names)
    runner = TorchRunner(module, FlatCall(module, example), exported.inputs, exported.outputs)
    session = OnnxRuntimeRunner(exported.path)
    for sizes in profile_points(model.dims).values():
        feeds = make_inputs(example.specs, sizes, 1)
        expected = runner.run(feeds)
        found = session.run(feeds)
        for output, array in expected.items():
            assert array.std() > 0
            assert np.abs(array - found[output]).max() < 1e-4 * array.std(), f"{output} at {sizes}"


def test_einsum_equations_of_maxvit_are_plain(tmp_path: Path) -> None:
    model = MODELS["maxvit"]()
    module = model.make().eval()
    example = example_from_specs(module, model.specs, [model.dims])
    exported = export_module(module, example, profiles=[model.dims], opset=20, folder=tmp_path)
    equations = [
        node.attributes["equation"].as_string() for node in load_graph(exported.path).graph if node.op_type == "Einsum"
    ]
    assert equations
    assert all(equation.islower() and " " not in equation for equation in equations)
