"""What an engine is measured against: PyTorch eager and compiled, onnxruntime's CUDA provider, Polygraphy, and others.

A peer is opened once, and then for each case on inputs that stay. What is not installed says so by
`MissingDependencyError`; whatever else a peer raises is its own failure, and no other side's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trtforge.runtime.errors import MissingDependencyError
from trtforge.runtime.timing import Call

__all__ = ["PeerModel", "Side", "as_tensors", "float32_products", "module_sides", "onnxruntime_side", "polygraphy_side"]

Open = Callable[[Mapping[str, torch.Tensor]], Call]
"""Makes a call on these inputs, by name and in the engine's order, on the GPU."""


@dataclass(frozen=True, slots=True)
class Side:
    """Something that runs the model, by the name that tables show."""

    name: str
    open: Open


@dataclass(frozen=True, slots=True, eq=False)
class PeerModel:
    """The PyTorch model itself.

    Attributes:
        module: In eval mode.
        bind: Arguments and keyword arguments of its forward, from tensors in the order of the engine's inputs.
        dtype: What it runs in.
    """

    module: torch.nn.Module
    bind: Callable[[Sequence[torch.Tensor]], tuple[Sequence[Any], Mapping[str, Any]]]
    dtype: torch.dtype


def module_sides(model: PeerModel, device: torch.device, wanted: Sequence[str]) -> list[Side]:
    """The model as it is, under `torch.compile`, and under Torch-TensorRT; those that are wanted.

    The module is moved and cast in place: inputs come in its dtype, images in channels_last, which serves convolutions.
    """
    images = any(isinstance(child, torch.nn.Conv2d) for child in model.module.modules())
    format = torch.channels_last if images else torch.contiguous_format
    model.module.to(device, model.dtype, memory_format=format)  # type: ignore[call-overload]

    def on(make: Callable[[], Callable[..., Any]]) -> Open:
        def open_case(inputs: Mapping[str, torch.Tensor]) -> Call:
            args, kwargs = model.bind([_cast(x, model.dtype, images) for x in inputs.values()])
            forward = make()

            def call() -> Any:
                with torch.inference_mode():
                    return forward(*args, **kwargs)

            return call

        return open_case

    makers: dict[str, Callable[[], Callable[..., Any]]] = {
        "eager": lambda: model.module,
        "compile": lambda: _compile(model.module, mode="max-autotune"),
        "torch-tensorrt": lambda: _torch_tensorrt(model.module),
    }
    return [Side(name, on(make)) for name, make in makers.items() if name in wanted]


@contextlib.contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """PyTorch's float32 products and convolutions round to TF32, or not, as the engine's do.

    By the older switches: `torch.compile` and `torch.export` read them, and torch raises there once the newer
    `fp32_precision` of cuDNN's convolutions or networks was set.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def onnxruntime_side(model: Path) -> Side:
    """Onnxruntime's CUDA provider on the graph that the engine was built from, inputs and outputs on the GPU."""
    runner: Any = None

    def open_case(inputs: Mapping[str, torch.Tensor]) -> Call:
        nonlocal runner
        from trtforge.runtime.onnx_runner import OnnxRuntimeRunner

        runner = runner or OnnxRuntimeRunner(model, provider="cuda")
        bound: Call = runner.bind_gpu({name: (x.data_ptr(), tuple(x.shape)) for name, x in inputs.items()})
        return bound

    return Side("onnxruntime", open_case)


def polygraphy_side(engine: Path, backend: str, *, tf32: bool) -> Side:
    """Polygraphy's TrtRunner on the same engine, with torch tensors on the GPU."""
    infer: Any = None

    def open_case(inputs: Mapping[str, torch.Tensor]) -> Call:
        nonlocal infer
        from trtforge.runtime.trt.polygraphy_runner import open_polygraphy

        infer = infer or open_polygraphy(engine, backend, tf32=tf32)
        feeds = dict(inputs)
        return lambda: infer(feeds)

    return Side("polygraphy", open_case)


def as_tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of any side's result, in order, whatever they are nested in; arrays become tensors."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [tensor for value in result.values() for tensor in as_tensors(value)]
    if isinstance(result, (tuple, list)):
        return [tensor for value in result for tensor in as_tensors(value)]
    if hasattr(result, "__array__"):
        import numpy as np

        from trtforge.runtime.torch_runner import to_torch

        return [to_torch(np.asarray(result))]
    return []


def _cast(x: torch.Tensor, dtype: torch.dtype, images: bool) -> torch.Tensor:
    typed = x.to(dtype) if x.is_floating_point() else x
    return typed.contiguous(memory_format=torch.channels_last) if images and typed.ndim == 4 else typed


def _compile(module: torch.nn.Module, **options: Any) -> Callable[..., Any]:
    # Else the second batch size would be compiled for any size, and the tenth not at all.
    torch.compiler.reset()
    compiled: Callable[..., Any] = torch.compile(module, dynamic=False, **options)
    return compiled


def _torch_tensorrt(module: torch.nn.Module) -> Callable[..., Any]:
    try:
        import torch_tensorrt  # noqa: F401  # its import registers the backend
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"torch_tensorrt does not load: {error}", fix="pip install torch-tensorrt, which needs the full tensorrt"
        ) from error
    return _compile(module, backend="torch_tensorrt")
