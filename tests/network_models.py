"""A small CNN twice: as a module, and layer by layer by TensorRT's API from the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_module() -> Any:
    """The reference; its weights are the same each time."""
    import torch

    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3), torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers).eval()


def save_weights(path: Path) -> None:
    """The module's weights as the network's function reads them, which has no torch."""
    import numpy as np

    np.savez(path, **{name: tensor.numpy() for name, tensor in make_module().state_dict().items()})


def define(network: Any, trt: Any, weights: str, scale: float = 1.0) -> Any:
    """`scale` other than 1 makes it another function than the module."""
    import numpy as np

    held = {name: np.ascontiguousarray(array * np.float32(scale)) for name, array in np.load(weights).items()}
    x = network.add_input("input", trt.float32, (-1, 3, 8, 8))
    first = network.add_convolution_nd(x, 8, (3, 3), trt.Weights(held["0.weight"]), trt.Weights(held["0.bias"]))
    first.padding_nd = (1, 1)
    relu = network.add_activation(first.get_output(0), trt.ActivationType.RELU)
    second = network.add_convolution_nd(
        relu.get_output(0), 4, (3, 3), trt.Weights(held["2.weight"]), trt.Weights(held["2.bias"])
    )
    last = network.add_activation(second.get_output(0), trt.ActivationType.SIGMOID).get_output(0)
    last.name = "output"
    network.mark_output(last)
    return held


def forget_output(network: Any, trt: Any) -> None:
    """A network without outputs."""
    network.add_input("input", trt.float32, (-1, 3, 8, 8))


def fail(network: Any, trt: Any) -> None:
    """Raises."""
    raise KeyError("no such weight")
