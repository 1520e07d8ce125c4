"""Runs a module on named numpy arrays: the reference that everything else is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch

from trtforge.runtime.errors import ExportError, ParityError, TrtForgeError
from trtforge.runtime.runner import Array, Tensors
from trtforge.runtime.specs import TensorSpec

__all__ = ["TorchRunner", "evaluation", "from_torch", "to_torch"]

Call = Callable[..., Sequence[torch.Tensor]]


class TorchRunner:
    """Runs a module in its own precision, as exactly as its device can: no TF32, no autocast, no dropout, no gradient.

    Args:
        module: Put into eval mode while it runs, and back afterwards.
        call: Runs it on tensors, one argument each, in the order of `inputs`, and returns tensors in that of
            `outputs`.
        inputs: What it takes.
        outputs: What it returns.
    """

    def __init__(
        self, module: torch.nn.Module, call: Call, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> None:
        self._module = module
        self._call = call
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)

    @property
    def name(self) -> str:
        return "torch"

    @property
    def version(self) -> str:
        return str(torch.__version__)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def run(self, feeds: Tensors) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            ExportError: the module itself fails on these inputs; its own error is the cause.
            ParityError: the module returned another number of tensors than it has outputs.
            KeyError: an input that `feeds` lacks.
        """
        device = next((t.device for t in (*self._module.parameters(), *self._module.buffers())), torch.device("cpu"))
        tensors = [to_torch(feeds[spec.name]).to(device) for spec in self._inputs]
        with evaluation(self._module), _exact(device), torch.inference_mode():
            results = self._run(tensors)
        if len(results) != len(self._outputs):
            raise ParityError(
                f"the module returned {len(results)} tensors, the exported graph has {len(self._outputs)} outputs",
                why="what it returns depends on its inputs' values or sizes",
            )
        return {spec.name: from_torch(tensor) for spec, tensor in zip(self._outputs, results, strict=True)}

    def _run(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        try:
            return self._call(*tensors)
        except TrtForgeError:
            raise
        except Exception as error:
            sizes = ", ".join(f"{s.name} {list(t.shape)}" for s, t in zip(self._inputs, tensors, strict=True))
            raise ExportError(
                f"the PyTorch model itself fails on inputs of sizes {sizes}: {type(error).__name__}: {error}",
                why="every size in the range of `dims` must work, and so must values from `values`",
                fix="narrow the range of the dimension, or give `values` that are legal (ids below the table's rows)",
            ) from error


def to_torch(array: Array) -> torch.Tensor:
    """A tensor of its own with the array's values; `ml_dtypes.bfloat16` becomes `torch.bfloat16`."""
    if array.dtype == ml_dtypes.bfloat16:
        # torch knows no ml_dtypes; the bits are the same
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))


def from_torch(tensor: torch.Tensor) -> Array:
    """An array of its own with the tensor's values; `torch.bfloat16` becomes `ml_dtypes.bfloat16`."""
    host = tensor.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        return np.array(host.view(torch.int16).numpy()).view(ml_dtypes.bfloat16)
    return np.array(host.numpy())


@contextlib.contextmanager
def evaluation(module: torch.nn.Module) -> Iterator[None]:
    """The module in eval mode; each submodule's own training flag is put back afterwards."""
    flags = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in flags:
            child.training = training


@contextlib.contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    # The older `allow_tf32` flags raise once anyone has set one of these, which torch has from 2.9 on.
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    backends = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    before = [backend.fp32_precision for backend in backends]
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    for backend in backends:
        backend.fp32_precision = "ieee"
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
