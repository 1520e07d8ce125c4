"""Runs an ONNX model with onnxruntime, in this process or (where its kernels may crash) in a child."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from trtforge.runtime.attention_masks import broadcast_masks, may_hold_attention
from trtforge.runtime.child import Emit, OnEvent, run_child
from trtforge.runtime.errors import ConfigError, ExportError, MissingDependencyError, ParityError
from trtforge.runtime.inputs import numpy_dtype
from trtforge.runtime.runner import Array, Tensors
from trtforge.runtime.specs import TensorSpec, is_dim_name
from trtforge.runtime.suggest import nearest

if TYPE_CHECKING:
    from types import ModuleType

    import onnx

__all__ = ["OnnxRuntimeRunner", "asked_threads", "onnxruntime_version", "run_onnx", "run_task"]

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_TYPES = {
    "float": "float32", "float16": "float16", "bfloat16": "bfloat16", "double": "float64", "int8": "int8",
    "uint8": "uint8", "int16": "int16", "uint16": "uint16", "int32": "int32", "uint32": "uint32", "int64": "int64",
    "uint64": "uint64", "bool": "bool",
}  # fmt: skip


class OnnxRuntimeRunner:
    """One onnxruntime session.

    Args:
        model: The `.onnx` file, or a serialised model.
        disable_quant_qdq: Keep Q/DQ pairs as they are written instead of fusing them into integer kernels: the
            fake-quantized values that a TensorRT engine is compared with.
        optimize: False runs the graph as it is written, node by node.
        extra_outputs: Names of tensors of the main graph that `run` returns as well.
        threads: Threads inside one operator; None: as many as OMP_NUM_THREADS says, which torch follows too, and
            without it what onnxruntime takes (the physical cores).
        provider: "cpu", or "cuda" for onnxruntime's CUDA provider with TF32 switched off.
        data_folder: Where a serialised model's external data lies.
        weights: Arrays for initializers that a serialised model calls external: they are used where they lie, which
            spares serialising and parsing them (1.5 of 2.6 s on ViT-B/16). The caller leaves them unchanged.
        optimized: Where to write the graph as onnxruntime's optimizer leaves it; it is for this machine alone.

    Raises:
        MissingDependencyError: onnxruntime, or the CUDA provider that was asked for, is not installed.
        ExportError: onnxruntime refuses the model: it is invalid, or a kernel is missing (bfloat16 Conv, MatMul and
            Gemm on the CPU).
        ConfigError: `extra_outputs` names a tensor that the main graph lacks.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        disable_quant_qdq: bool = False,
        optimize: bool = True,
        extra_outputs: Sequence[str] = (),
        threads: int | None = None,
        provider: str = "cpu",
        data_folder: Path | None = None,
        weights: Tensors | None = None,
        optimized: Path | None = None,
    ) -> None:
        ort = _import_onnxruntime()
        self._ort = ort
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised too; its warnings name nothing that a user can change
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        options.intra_op_num_threads = threads or asked_threads() or 0  # 0: its own choice
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        disabled: list[str] | None = None
        if disable_quant_qdq:
            options.add_session_config_entry("session.disable_quant_qdq", "1")
            # ORT_ENABLE_EXTENDED drops a Relu or Clip before any FP8 QuantizeLinear, and a Clip before an int8 one
            # whose whole range is below 1e-7: ResNet-18 fell from 24 to -5 dB, MobileNetV2 from 32 to 2 (1.32).
            disabled = ["ClipQuantRewrite", "ReluQuantRewrite"]
        source: str | bytes = model if isinstance(model, bytes) else str(model)
        edited = _edit(model, extra_outputs)
        if edited is not None:
            source = edited
            data_folder = model.parent if isinstance(model, Path) else data_folder
        if data_folder is not None:
            folder = str(data_folder.resolve())
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        self._weights = dict(weights or {})  # onnxruntime does not hold on to the arrays
        if self._weights:
            values = [_to_ort(ort, array) for array in self._weights.values()]
            options.add_external_initializers(list(self._weights), values)
        try:
            self._session = ort.InferenceSession(
                source, options, providers=_providers(ort, provider), disabled_optimizers=disabled
            )
        except _ort_errors(ort) as error:
            raise _load_error(model, error) from error
        self.provider: str = self._session.get_providers()[0]
        self._inputs = tuple(_spec(arg) for arg in self._session.get_inputs())
        self._outputs = tuple(_spec(arg) for arg in self._session.get_outputs())

    @property
    def name(self) -> str:
        """`"onnxruntime"`."""
        return "onnxruntime"

    @property
    def version(self) -> str:
        """The version of onnxruntime."""
        return str(self._ort.__version__)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Graph inputs in order; a dimension without a name or size is called "?"."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Graph outputs in order, then `extra_outputs`."""
        return self._outputs

    def run(self, feeds: Tensors) -> dict[str, Array]:
        """Outputs by name for one set of inputs.

        Raises:
            ConfigError: an input is missing, unknown, or has another dtype or shape than the graph's.
            ParityError: onnxruntime failed while it ran.
        """
        return {name: _from_ort(value) for name, value in self._run(feeds).items()}

    def run_borrowed(self, feeds: Tensors) -> dict[str, Array]:
        """As `run`, but arrays may lie in onnxruntime's memory, which they keep: nothing is copied. No bfloat16."""
        return {name: value.numpy() for name, value in self._run(feeds).items()}

    def bind(self, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
        """A run on arrays that stay, of a session of the CPU provider, for one thread: `inputs` are read and `outputs`
        written where they lie.

        Fresh memory is in no cache: with 52 outputs it takes a tenth of MobileNetV2's time. No bfloat16.

        Raises:
            ParityError: onnxruntime failed while it ran, or an output has another shape this time.
        """
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, _to_ort(self._ort, array))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, _to_ort(self._ort, array))

        def run() -> None:
            try:
                self._session.run_with_iobinding(binding)
            except _ort_errors(self._ort) as error:
                raise self._run_error(inputs, error) from error  # reads `inputs`, as onnxruntime keeps no array alive

        return run

    def bind_gpu(self, inputs: Mapping[str, tuple[int, tuple[int, ...]]]) -> Callable[[], dict[str, Array]]:
        """A run of a session of the CUDA provider on inputs that stay on the GPU; outputs stay there too.

        Args:
            inputs: Address on the GPU and shape, by name.

        Returns:
            Runs, waits, and returns outputs by name that are copied to the host only where they are read.
        """
        binding = self._session.io_binding()
        for spec in self._inputs:
            address, shape = inputs[spec.name]
            binding.bind_input(spec.name, "cuda", 0, numpy_dtype(spec.dtype), shape, address)
        for spec in self._outputs:
            binding.bind_output(spec.name, "cuda")
        names = [spec.name for spec in self._outputs]

        def run() -> dict[str, Any]:
            self._session.run_with_iobinding(binding)
            return dict(zip(names, map(_Lazy, binding.get_outputs()), strict=True))

        return run

    def _run(self, feeds: Tensors) -> dict[str, Any]:
        _check_feeds(self._inputs, feeds)
        ort = self._ort
        names = [spec.name for spec in self._outputs]
        try:
            values = {spec.name: _to_ort(ort, np.asarray(feeds[spec.name], order="C")) for spec in self._inputs}
            return dict(zip(names, self._session.run_with_ort_values(names, values), strict=True))
        except _ort_errors(ort) as error:
            raise self._run_error(feeds, error) from error

    def _run_error(self, feeds: Tensors, error: Exception) -> ParityError:
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        return ParityError(
            f"onnxruntime {self.version} failed on inputs of shape {shapes}",
            why=_first_lines(error),
            fix="run the model in PyTorch at these shapes: the export may have frozen one of them",
        )


class _Lazy:
    """An output on the GPU, copied when numpy asks for it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if self._value.data_type() == "tensor(bfloat16)":
            raise TypeError("onnxruntime copies no bfloat16 output from the GPU")
        return _from_ort(self._value)


def run_onnx(
    model: Path,
    feeds: Path,
    outputs: Path,
    *,
    disable_quant_qdq: bool = False,
    optimize: bool = True,
    extra_outputs: Sequence[str] = (),
    threads: int | None = None,
    provider: str = "cpu",
    on_event: OnEvent | None = None,
) -> dict[str, Any]:
    """Runs every sample of a file in a child process: onnxruntime's fp16 kernels have ended processes by SIGSEGV.

    Args:
        model: The `.onnx` file.
        feeds: Safetensors with keys `<sample>/<input>`; a sample's own name has no slash.
        outputs: Written by the child: safetensors with keys `<sample>/<output>`.
        disable_quant_qdq: As for `OnnxRuntimeRunner`, like the following ones.
        optimize: See there.
        extra_outputs: See there.
        threads: See there.
        provider: See there.
        on_event: Receives `{"event": "progress", "phase": "onnxruntime", "done", "total"}` after each sample.

    Returns:
        `{"runner", "version", "provider", "samples", "seconds", "inputs", "outputs"}`; seconds of running alone.

    Raises:
        ChildCrashError: the kernels ended the child.
        TrtForgeError: as `OnnxRuntimeRunner` raises; `ConfigError` for an empty file of feeds.
    """
    args = {
        "model": str(model),
        "feeds": str(feeds),
        "outputs": str(outputs),
        "disable_quant_qdq": disable_quant_qdq,
        "optimize": optimize,
        "extra_outputs": list(extra_outputs),
        "threads": threads,
        "provider": provider,
    }
    return run_child("onnx.run", args, on_event=on_event)


def run_task(args: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """The child's end of `run_onnx`: same arguments, JSON-able."""
    from trtforge.runtime.tensors import load_tensors, save_tensors

    tensors, _ = load_tensors(Path(args["feeds"]))
    samples = _group_samples(tensors)
    if not samples:
        raise ConfigError(f"{args['feeds']} holds no tensors", fix="record at least one sample `<sample>/<input>`")
    runner = OnnxRuntimeRunner(
        Path(args["model"]),
        disable_quant_qdq=args.get("disable_quant_qdq", False),
        optimize=args.get("optimize", True),
        extra_outputs=args.get("extra_outputs", ()),
        threads=args.get("threads"),
        provider=args.get("provider", "cpu"),
    )
    results: dict[str, Array] = {}
    seconds = 0.0
    for done, (sample, feeds) in enumerate(samples.items(), 1):
        start = time.perf_counter()
        produced = runner.run(feeds)
        seconds += time.perf_counter() - start
        results.update({f"{sample}/{name}": array for name, array in produced.items()})
        emit("progress", phase="onnxruntime", done=done, total=len(samples))
    save_tensors(Path(args["outputs"]), results, {"runner": runner.name, "version": runner.version})
    return {
        "runner": runner.name,
        "version": runner.version,
        "provider": runner.provider,
        "samples": len(samples),
        "seconds": seconds,
        "inputs": [spec.to_json() for spec in runner.inputs],
        "outputs": [spec.to_json() for spec in runner.outputs],
    }


def onnxruntime_version() -> str:
    """Raises `MissingDependencyError` where it is not installed."""
    return str(_import_onnxruntime().__version__)


def asked_threads() -> int | None:
    """What OMP_NUM_THREADS asks for, which onnxruntime does not read; None where it says nothing."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return (int(first) or None) if first.isdecimal() else None


def _import_onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"onnxruntime cannot be imported: {error}", fix="pip install onnxruntime (or onnxruntime-gpu)"
        ) from error
    module: ModuleType = onnxruntime
    return module


def _providers(ort: ModuleType, provider: str) -> list[Any]:
    if provider == "cpu":
        return ["CPUExecutionProvider"]
    if provider != "cuda":
        raise ConfigError(f"onnxruntime provider {provider!r}", fix=nearest(provider, ("cpu", "cuda")))
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise MissingDependencyError(
            f"this onnxruntime {ort.__version__} has no CUDA provider", fix="pip install onnxruntime-gpu"
        )
    # TF32 is on by default there and keeps 10 bits of mantissa: no reference for fp32.
    return [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]


def _ort_errors(ort: ModuleType) -> tuple[type[Exception], ...]:
    """Exceptions of onnxruntime share no base class; a conversion that fails in its bindings is a RuntimeError."""
    state = ort.capi.onnxruntime_pybind11_state
    kinds = (getattr(state, name) for name in dir(state))
    found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception)]
    return (*found, RuntimeError)


def _load_error(model: Path | bytes, error: Exception) -> ExportError:
    where = str(model) if isinstance(model, Path) else f"a model of {len(model)} bytes"
    missing = type(error).__name__ == "NotImplemented"
    return ExportError(
        f"onnxruntime cannot load {where}",
        why=_first_lines(error),
        fix="emulate the low precision (trtforge.validation.emulate): the CPU provider has no such kernel"
        if missing
        else "check the file with onnx.checker.check_model(path, full_check=True)",
    )


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "\n    ".join(lines[:4])


def _edit(model: Path | bytes, extra_outputs: Sequence[str]) -> bytes | None:
    """The model with more outputs, and with attention masks that onnxruntime takes; None where it is fine as it is."""
    missing = isinstance(model, Path) and not model.is_file()
    if missing or not (extra_outputs or may_hold_attention(model)):
        return None
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        proto = (
            onnx.load_model_from_string(model)
            if isinstance(model, bytes)
            else onnx.load(model, load_external_data=False)
        )
    except DecodeError:  # onnxruntime says what is wrong
        return None
    changed = broadcast_masks(proto)
    if extra_outputs:
        _add_outputs(proto.graph, extra_outputs)
    return bytes(proto.SerializeToString()) if changed or extra_outputs else None


def _add_outputs(graph: onnx.GraphProto, names: Iterable[str]) -> None:
    present = {value.name for value in graph.output}
    known = {name for node in graph.node for name in node.output if name}
    known |= {value.name for value in graph.initializer} | {value.name for value in graph.input}
    for name in names:
        if name not in known:
            raise ConfigError(f"the graph has no tensor {name!r}", fix=nearest(name, known))
        if name not in present:
            present.add(name)
            # A name alone is enough: onnxruntime infers the type itself.
            graph.output.add().name = name


def _spec(arg: Any) -> TensorSpec:
    kind = arg.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(
        dim if isinstance(dim, int) or (isinstance(dim, str) and is_dim_name(dim)) else "?" for dim in arg.shape
    )
    return TensorSpec(arg.name, _TYPES.get(kind, kind), shape)


def _to_ort(ort: ModuleType, array: Array) -> Any:
    if array.dtype == ml_dtypes.bfloat16:  # numpy has no such type, so the bindings take the bits and a type number
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


def _from_ort(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return np.array(value.numpy(), copy=True)
    shape = tuple(value.shape())
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, ml_dtypes.bfloat16)
    # OrtValue.numpy() refuses bfloat16; outputs of `run_with_ort_values` lie in host memory.
    bits = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(value.data_ptr()))
    copied: Array = np.array(bits, copy=True).view(ml_dtypes.bfloat16).reshape(shape)
    return copied


def _check_feeds(specs: Sequence[TensorSpec], feeds: Tensors) -> None:
    names = [spec.name for spec in specs]
    for name in feeds:
        if name not in names:
            raise ConfigError(f"the model has no input {name!r}", fix=nearest(name, names))
    sizes: dict[str, tuple[str, int]] = {}
    for spec in specs:
        if spec.name not in feeds:
            raise ConfigError(f"input {spec.name!r} is missing", fix=f"give all of {', '.join(names)}")
        array = feeds[spec.name]
        if array.dtype.name != spec.dtype:
            raise ConfigError(
                f"input {spec.name!r} is {array.dtype.name}, the model takes {spec.dtype}",
                fix=f"convert it with .astype({spec.dtype!r})",
            )
        _check_shape(spec, array.shape, sizes)


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, tuple[str, int]]) -> None:
    wanted = list(spec.shape)
    if len(shape) != len(wanted) or any(
        isinstance(dim, int) and dim != size for dim, size in zip(wanted, shape, strict=True)
    ):
        raise ConfigError(f"input {spec.name!r} has shape {list(shape)}, the model takes {wanted}")
    for dim, size in zip(wanted, shape, strict=True):
        if not isinstance(dim, str) or dim == "?":
            continue
        first, known = sizes.setdefault(dim, (spec.name, size))
        if known != size:
            raise ConfigError(
                f"dimension {dim!r} is {known} in input {first!r} and {size} in input {spec.name!r}",
                fix="one name means one size; give the dimensions different names if they differ",
            )


def _group_samples(tensors: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    samples: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        sample, slash, name = key.partition("/")
        if not slash:
            raise ConfigError(f"tensor {key!r} is not named `<sample>/<input>`")
        samples.setdefault(sample, {})[name] = array
    return samples
