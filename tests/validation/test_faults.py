"""Default tolerances against real faults: each must be refused, and what only rounds or rewrites must pass."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from trtforge.runtime.specs import DimRange, InputSpec
from trtforge.validation.compare import compare
from trtforge.validation.golden import plan_points, record, run_samples
from trtforge.validation.parity import Candidate, Verdict
from trtforge.validation.proof import Proof
from trtforge.validation.tolerance import resolve_tolerance

INPUTS = (InputSpec("image", "float32", ("batch", 3, 16, 16)),)
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        hidden = 2 * width
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Net(nn.Module):
    """Convolutions, then attention, then a head; every part matters to the output."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 32, 3, stride=4, padding=1)
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.head = nn.Linear(32, 10)
        self.axis = -1

    def forward(self, image):
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        x = self.blocks(x)
        return self.head(torch.softmax(x, self.axis).mul(32).mean(1) + x.mean(1))


class Eager:
    """PyTorch at the Runner seam, in any floating type."""

    name, version, inputs, outputs = "torch", torch.__version__, INPUTS, ()

    def __init__(self, module, dtype=torch.float32, change=lambda x: x):
        self.module, self.dtype, self.change = copy.deepcopy(module).to(dtype), dtype, change

    def run(self, feeds):
        with torch.no_grad():
            return {"y": self.module(self.change(torch.from_numpy(feeds["image"])).to(self.dtype)).float().numpy()}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        nn.init.uniform_(net.norm.weight, 0.5, 2)
        nn.init.normal_(net.norm.bias)
        net(torch.randn(64, 3, 16, 16))  # batch norm's statistics
    return net.eval()


@pytest.fixture(scope="module")
def golden(net):
    return record(Eager(net), INPUTS, plan_points([{"batch": DimRange(1, 4, 8)}]))


def verdict(golden, runner, precision):
    candidate = Candidate("engine", "torch", torch.__version__, precision, {})
    return compare(golden, run_samples(golden, runner), resolve_tolerance([precision]), candidate)


def edited(net, edit):
    net = copy.deepcopy(net)
    with torch.no_grad():
        edit(net)
    return net


def swap_channels(net):
    """The halves of the channels, as two operands of a Concat in the wrong order."""
    net.stem.weight.copy_(net.stem.weight.roll(8, 0))
    net.stem.bias.copy_(net.stem.bias.roll(8, 0))


def swap_two_channels(net):
    net.stem.weight[[0, 1]] = net.stem.weight[[1, 0]]
    net.stem.bias[[0, 1]] = net.stem.bias[[1, 0]]


def transpose_weight(net):
    net.blocks[0].attention.out_proj.weight.copy_(net.blocks[0].attention.out_proj.weight.T.clone())


def transpose_kernel(net):
    net.conv.weight.copy_(net.conv.weight.transpose(2, 3).clone())


def double_scale(net):
    net.conv.weight.mul_(2)


def drop_layer(net):
    net.blocks[1] = nn.Identity()


def drop_activation(net):
    net.blocks[0].mlp[2] = nn.Identity()


def wrong_axis(net):
    net.axis = 1


def forget_bias(net):
    net.conv.bias.zero_()


def forget_norm(net):
    net.norm = nn.Identity()


FAULTS = [
    swap_channels, transpose_weight, transpose_kernel, double_scale, drop_layer, drop_activation, wrong_axis,
    forget_bias, forget_norm,
]  # fmt: skip

INPUT_FAULTS = {
    "red and blue swapped": lambda x: x.flip(1),
    "rows and columns swapped": lambda x: x.transpose(2, 3),
    "not normalised": lambda x: x * 0.5 + 0.5,
    "batch in reverse": lambda x: x.flip(0),
}


@pytest.mark.parametrize("precision", TYPES)
def test_rounding_alone_passes(net, golden, precision):
    report = verdict(golden, Eager(net, TYPES[precision]), precision)
    assert report.passed, report.reasons


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_faults_are_refused(net, golden, fault, precision):
    report = verdict(golden, Eager(edited(net, fault), TYPES[precision]), precision)
    # bf16's limits let two of these pass; that they are as far off as another input's answer refuses them.
    assert not report.passed, report.outputs[0].pooled
    assert report.verdict is Verdict.FAILED or precision == "bf16"


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("fault", INPUT_FAULTS)
def test_wrong_inputs_are_refused(net, golden, fault, precision):
    report = verdict(golden, Eager(net, TYPES[precision], INPUT_FAULTS[fault]), precision)
    assert report.verdict is Verdict.FAILED, report.outputs[0].pooled


def test_fault_below_bf16s_own_error_is_found_elsewhere_in_the_chain(net, golden):
    """Two of sixteen hidden channels swapped cost 24 dB, no more than bf16 itself costs EfficientNet-Lite0.

    No limit on the output can tell those apart. In the graph the export's limit finds it, in the engine a comparison
    with onnxruntime on the same ONNX does.
    """
    faulty = edited(net, swap_two_channels)
    engine = verdict(golden, Eager(faulty, torch.bfloat16), "bf16")
    assert engine.passed
    assert verdict(golden, Eager(faulty), "fp32").verdict is Verdict.FAILED
    export = replace_stage(verdict(golden, Eager(net), "fp32"), "export")
    precision = replace_stage(verdict(golden, Eager(net, torch.bfloat16), "bf16"), "precision")
    assert any("went astray" in note for note in Proof((export, precision, engine)).all_notes)


def replace_stage(report, stage):
    return replace(report, candidate=replace(report.candidate, stage=stage))


def fuse_norm(net):
    net.stem = nn.utils.fuse_conv_bn_eval(net.stem, net.norm)
    net.norm = nn.Identity()


def permute_hidden_channels(net):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    up, down = net.blocks[0].mlp[1], net.blocks[0].mlp[3]
    up.weight.copy_(up.weight[order])
    up.bias.copy_(up.bias[order])
    down.weight.copy_(down.weight[:, order])


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("rewrite", [fuse_norm, permute_hidden_channels], ids=lambda f: f.__name__)
def test_harmless_rewrites_pass(net, golden, rewrite, precision):
    report = verdict(golden, Eager(edited(net, rewrite), TYPES[precision]), precision)
    assert report.passed, report.reasons


def test_double_precision_passes_as_fp32(net, golden):
    assert verdict(golden, Eager(net, torch.float64), "fp32").passed


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_is_not_taken_for_fp32(net, golden, precision):
    """Nor is TF32, whose significand is fp16's: 80 dB tell."""
    assert verdict(golden, Eager(net, TYPES[precision]), "fp32").verdict is Verdict.FAILED


def test_overflow_in_fp16_is_refused(net):
    def enlarge(module):
        module.conv.weight.mul_(1e5)
        module.blocks = nn.Identity()

    large = edited(net, enlarge)
    golden = record(Eager(large), INPUTS, plan_points([{"batch": DimRange(1, 4, 8)}]))
    report = verdict(golden, Eager(large, torch.float16), "fp16")
    assert report.verdict is Verdict.FAILED
    assert "65504" in report.fix


@pytest.mark.parametrize("zeroed", ["weight", "both"])
def test_zero_initialised_head_is_not_proved(net, zeroed):
    """torchvision's ViT and EfficientNet have one; any error before it is invisible."""

    def zero(module):
        module.head.weight.zero_()
        if zeroed == "both":
            module.head.bias.zero_()

    zero_net = edited(net, zero)
    golden = record(Eager(zero_net), INPUTS, plan_points([{"batch": DimRange(1, 4, 8)}]))
    report = verdict(golden, Eager(edited(zero_net, drop_layer), torch.float16), "fp16")
    assert report.verdict is not Verdict.PASSED
    exact = verdict(golden, Eager(edited(zero_net, drop_layer)), "fp32")
    assert exact.verdict is Verdict.NOT_PROVED
    assert np.isposinf(exact.outputs[0].pooled.sqnr_db), "the fault cannot be seen"
