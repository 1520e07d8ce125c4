"""The float model, cut down to what calibration needs, and run so that its activations come out for next to nothing.

Only the tensors asked for are outputs, and nodes that lead to none of them are gone. On x86 onnxruntime keeps images in
blocks of channels (NCHWc) and puts a `ReorderOutput` before every output: 3 ms on MobileNetV2, whose inference takes 9.
A histogram does not care about the order of elements, so the blocked tensors leave the runtime instead: its optimized
graph is written out, the reorders are cut off, and the rest runs as it stands, kernels and results being the same. The
first batch proves it on both graphs; a tensor that differs (blocks padded with channels, say) keeps its reorder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx

from trtforge.calibration.histogram import Histogram
from trtforge.calibration.pieces import Pieces, reads, split
from trtforge.runtime.errors import CalibrationError, TrtForgeError
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.publish import scratch_folder
from trtforge.runtime.runner import Array, Tensors
from trtforge.runtime.suggest import nearest

__all__ = ["Taps"]

_BLOCKED_LIMIT = 32_000_000
"""Bytes of model past which it does not pay: the optimized graph has every weight again, to be written and loaded (0.8
seconds for ResNet-18's 47 MB), and networks of that size compute so much that 1 or 2 ms an image do not show."""

_BLOCK = 16
"""Channels of a block: 16 with AVX-512, else 8."""

_LARGE = 1024
_DETACHED = {1: np.float32, 10: np.float16, 11: np.float64}
"""By `TensorProto.DataType`; of types that numpy has only through ml_dtypes onnxruntime's bindings take no array."""


class Taps:
    """Runs a float model and gives chosen tensors. One object may serve several threads at once.

    Args:
        model: The `.onnx` file.
        tensors: Names of values of its main graph; graph inputs come back as they were fed.
        threads: Threads inside one operator; None leaves it to onnxruntime.
        provider: "cpu" or "cuda".

    Raises:
        CalibrationError: the main graph has no such tensor.
        MissingDependencyError, ExportError: as `OnnxRuntimeRunner`.
    """

    def __init__(self, model: Path, tensors: Sequence[str], *, threads: int | None, provider: str) -> None:
        proto = onnx.load(model, load_external_data=False)
        fed = {value.name for value in proto.graph.input}
        _check_known(proto, tensors, fed)
        self._threads = threads
        self._fed = tuple(name for name in tensors if name in fed)
        self._names = tuple(name for name in tensors if name not in fed)
        self._pieces = Pieces((), {})
        self._optimized: onnx.ModelProto | None = None
        if not self._names:
            return
        _choose_outputs(proto, self._names)
        weights = _detach_weights(proto)
        with scratch_folder() as folder:
            written = folder / "optimized.onnx"
            optimized = written if provider == "cpu" and _total_size(model) < _BLOCKED_LIMIT else None
            runner = OnnxRuntimeRunner(
                proto.SerializeToString(),
                threads=threads,
                provider=provider,
                data_folder=model.parent,
                weights=weights,
                optimized=optimized,
            )
            self._pieces = Pieces([runner], {name: name for name in self._names})
            if written.exists():
                self._optimized = onnx.load(written)

    def settle(self, feeds: Tensors) -> None:
        """Looks on one batch for tensors that may leave the runtime in blocks; does nothing from the second call on.

        To be called before there are readers.
        """
        proto, self._optimized = self._optimized, None
        if proto is None:
            return
        weights = _detach_weights(proto)
        # Both graphs at once, where each has one thread and a sample; a whole batch's activations twice are too much.
        with ThreadPoolExecutor(2 if self._threads == 1 else 1, thread_name_prefix="settle") as pool:
            plain = pool.submit(_states, self._pieces, feeds)
            chosen = set(self._names)
            try:
                for _ in range(2):  # all of them, then those that proved equal
                    pieces = self._in_blocks(proto, chosen, weights)
                    found = pool.submit(_states, pieces, feeds).result()
                    equal = {name for name, state in plain.result().items() if found[name] == state}
                    if len(equal) == len(self._names):
                        self._pieces = pieces
                        return
                    chosen &= equal
            except TrtForgeError:
                return  # the graph runs as it was; if activations are not finite, that says so, with tensor and batch

    def _in_blocks(self, proto: onnx.ModelProto, chosen: Iterable[str], weights: Tensors) -> Pieces:
        """The optimized graph without the reorders of `chosen`; in one piece where an operator has several threads."""
        graph = onnx.ModelProto()
        graph.CopyFrom(proto)
        blocked = _cut_reorders(graph, chosen)
        # Each session with several threads would have its own, which wait in loops for more work.
        parts = split(graph) if self._threads == 1 else [graph]
        runners = [
            OnnxRuntimeRunner(
                part.SerializeToString(),
                optimize=False,
                threads=self._threads,
                weights={
                    tensor.name: weights[tensor.name] for tensor in part.graph.initializer if tensor.name in weights
                },
            )
            for part in parts
        ]
        return Pieces(runners, {blocked.get(name, name): name for name in self._names})

    def run(self, feeds: Tensors) -> dict[str, Array]:
        """The tensors by name; after `settle` elements may come in any order, and shapes with them.

        Raises:
            ParityError: onnxruntime failed.
        """
        found = {name: feeds[name] for name in self._fed}
        for tensors in self._pieces.run(feeds):
            found |= tensors
        return found

    def reader(self) -> Callable[[Tensors], Iterator[dict[str, Array]]]:
        """`run` for one thread, a few tensors at a time; arrays hold until the next are asked for.

        Most then lie in the same memory again.
        """
        read = self._pieces.reader()

        def read_all(feeds: Tensors) -> Iterator[dict[str, Array]]:
            if self._fed:
                yield {name: feeds[name] for name in self._fed}
            yield from read(feeds)

        return read_all


def _check_known(proto: onnx.ModelProto, tensors: Iterable[str], fed: set[str]) -> None:
    known = fed | {name for node in proto.graph.node for name in node.output if name}
    for name in tensors:
        if name not in known:
            raise CalibrationError(
                f"the graph has no tensor {name!r} to calibrate",
                why=nearest(name, known),
                fix="calibrate the graph that placement saw; tensors in If, Loop and Scan bodies cannot be measured",
            )


def _choose_outputs(proto: onnx.ModelProto, names: Iterable[str]) -> None:
    """Makes `names` the outputs, and drops nodes, initializers and inputs that lead to none of them."""
    graph = proto.graph
    del graph.output[:]
    # A name alone is enough: onnxruntime infers the type itself.
    graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.isdisjoint(node.output):
            continue
        kept.append(node)
        needed.update(reads(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for entries in (graph.initializer, graph.input, graph.sparse_initializer):
        spare = [entry for entry in entries if _name(entry) not in needed]
        for entry in spare:
            entries.remove(entry)


def _detach_weights(proto: onnx.ModelProto) -> dict[str, Array]:
    """Takes large initializers out of the graph, which then calls them external.

    So weights are neither serialised, searched nor parsed once more: a session of ResNet-18 begins in a third of the
    time.
    """
    weights: dict[str, Array] = {}
    for tensor in proto.graph.initializer:
        dtype, raw = _DETACHED.get(tensor.data_type), tensor.raw_data  # empty where the weights are external already
        if dtype is None or len(raw) < _LARGE:
            continue
        weights[tensor.name] = np.frombuffer(raw, dtype).reshape(tuple(tensor.dims))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        # Never opened: onnxruntime asks for an array by name first.
        tensor.external_data.add(key="location", value="weights")
    return weights


def _name(entry: object) -> str:
    return str(getattr(entry, "name", "") or entry.values.name)  # type: ignore[attr-defined]


def _cut_reorders(proto: onnx.ModelProto, names: Iterable[str]) -> dict[str, str]:
    """Makes the blocked tensor an output in place of its reordered copy. Returns its name by the copy's."""
    graph = proto.graph
    reorders = {node.output[0]: node for node in graph.node if node.op_type == "ReorderOutput"}
    read = {name for node in graph.node for name in reads(node)}
    blocked: dict[str, str] = {}
    for name in names:
        node = reorders.get(name)
        # Two copies of one blocked tensor would need one output twice; what does not fill its blocks holds padding.
        if node is not None and node.input[0] not in blocked.values() and _channels(node) % _BLOCK == 0:
            blocked[name] = node.input[0]
            if name not in read:
                graph.node.remove(node)
    for value in graph.output:
        if value.name in blocked:
            value.CopyFrom(onnx.helper.make_empty_tensor_value_info(blocked[value.name]))
    return blocked


def _channels(node: onnx.NodeProto) -> int:
    """Of what a `ReorderOutput` gives; 1 where it does not say."""
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == "channels"), 1)


def _states(pieces: Pieces, feeds: Tensors) -> dict[str, Histogram]:
    found: dict[str, Histogram] = {}
    for tensors in pieces.run(feeds):
        for name, array in tensors.items():
            found[name] = Histogram()
            found[name].add(array)
    return found


def _total_size(model: Path) -> int:
    data = model.with_name(model.name + ".data")
    return model.stat().st_size + (data.stat().st_size if data.exists() else 0)
