"""Runs a graph in pieces, so that what a piece computes is counted while it is still in a cache.

MobileNetV2 has 27 MB of activations a sample. Run whole, all of them are written to memory before the first is counted.
A piece gives a few tensors, and later pieces write over the buffers that no one reads any more, of which there are 15
MB: running and counting 128 samples took 0.645 s instead of 0.729 on two cores (Zen 4); without counting 0.508.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, KeysView, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.helper import make_tensor_value_info

from trtforge.runtime.errors import ParityError
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.runner import Array, Tensors

__all__ = ["Pieces", "reads", "split"]

_OUTPUTS = 4
"""Outputs of a piece. On MobileNetV2 3 to 8 take the same time; each piece costs some microseconds to start."""

_ALIGNMENT = 64

_CROSSING = set(range(1, onnx.TensorProto.UINT64 + 1)) - {onnx.TensorProto.STRING}
"""By `TensorProto.DataType`: the types before bfloat16 and those that only ml_dtypes has, strings left out."""

Read = Callable[[Tensors], Iterator[dict[str, Array]]]
Bytes = NDArray[np.uint8]


class Pieces:
    """Sessions that run one after another, each on what was fed and what earlier ones gave.

    Args:
        runners: In order.
        names: The tensor that an output carries, for each output that is asked for.
    """

    def __init__(self, runners: Sequence[OnnxRuntimeRunner], names: Mapping[str, str]) -> None:
        self._runners = tuple(runners)
        self._names = names
        self._last = {spec.name: index for index, runner in enumerate(runners) for spec in runner.inputs}
        """By value, the last piece that reads it."""

    def __len__(self) -> int:
        return len(self._runners)

    def run(self, feeds: Tensors, start: int = 0) -> Iterator[dict[str, Array]]:
        """The tensors by name, piece by piece, in memory of their own. Several threads may call it at once.

        Args:
            feeds: What is fed, and what pieces before `start` gave.
            start: The first piece to run.

        Raises:
            ConfigError, ParityError: as `OnnxRuntimeRunner.run`.
        """
        return (self.named(piece.outputs) for piece in self.walk(feeds, start))

    def reader(self) -> Read:
        """`run` for one thread; arrays hold until the next are asked for.

        As long as shapes stay those of the first call, a tensor comes in the array in which it came the last time.
        Where they do not, or another provider than the CPU's runs, it is `run`.
        """
        return _Reader(self) if all(runner.provider == "CPUExecutionProvider" for runner in self._runners) else self.run

    def walk(self, feeds: Tensors, start: int = 0) -> Iterator[_Ran]:
        """`run`, with all that pieces take and give."""
        values = dict(feeds)
        for index, runner in enumerate(self._runners[start:], start):
            inputs = {spec.name: values[spec.name] for spec in runner.inputs}
            outputs = runner.run_borrowed(inputs)
            values = {name: value for name, value in (values | outputs).items() if self._last.get(name, -1) > index}
            yield _Ran(runner, inputs, outputs, values.keys())

    def named(self, outputs: Tensors) -> dict[str, Array]:
        """Those that were asked for, by tensor."""
        return {self._names[name]: array for name, array in outputs.items() if name in self._names}


@dataclass(frozen=True, slots=True)
class _Ran:
    """A piece that has run; `alive` is what later ones read."""

    runner: OnnxRuntimeRunner
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    alive: KeysView[str]


class _Reader:
    """Runs pieces in buffers that stay."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._shapes: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] | None = None
        """Of what is fed, where buffers fit it."""
        self._inputs: dict[str, Array] = {}
        self._values: dict[str, Array] = {}
        """The buffers by value, `_inputs` among them; some lie in the same memory."""
        self._steps: list[tuple[Callable[[], None], dict[str, Array]]] = []

    def __call__(self, feeds: Tensors) -> Iterator[dict[str, Array]]:
        shapes = {name: (array.dtype, array.shape) for name, array in feeds.items()}
        if self._shapes is None:
            yield from self._run_first(feeds)
            self._shapes = shapes
        elif shapes == self._shapes:
            yield from self._run_again(feeds)
        else:
            yield from self._pieces.run(feeds)

    def _run_first(self, feeds: Tensors) -> Iterator[dict[str, Array]]:
        values, spare, lent = self._values, list[Bytes](), dict[str, Bytes]()
        for piece in self._pieces.walk(feeds):
            for name in piece.inputs.keys() - values.keys():
                values[name] = self._inputs[name] = np.array(piece.inputs[name], order="C")
            outputs = piece.outputs
            if len(self._pieces) > 1:  # else nothing would share memory: onnxruntime's own does, and once is enough
                lent |= {name: _take(spare, array.nbytes) for name, array in outputs.items()}
                outputs = {name: _shape(lent[name], array) for name, array in outputs.items()}
            values |= outputs
            run = piece.runner.bind({name: values[name] for name in piece.inputs}, outputs)
            self._steps.append((run, self._pieces.named(outputs)))
            yield self._pieces.named(piece.outputs)
            spare += [lent.pop(name) for name in lent.keys() - piece.alive]

    def _run_again(self, feeds: Tensors) -> Iterator[dict[str, Array]]:
        for name, buffer in self._inputs.items():
            np.copyto(buffer, feeds[name])
        for index, (run, tensors) in enumerate(self._steps):
            try:
                run()
            except ParityError:
                self._shapes = {}  # never again: shapes depend on values, or it cannot run and what follows says why
                yield from self._pieces.run(self._values, index)
                return
            yield tensors


def _shape(block: Bytes, like: Array) -> Array:
    return block[: like.nbytes].view(like.dtype).reshape(like.shape)


def _take(spare: list[Bytes], size: int) -> Bytes:
    """The smallest spare block that holds so many bytes, which is spare no longer; a new one where none does."""
    fitting = [index for index, block in enumerate(spare) if block.nbytes >= size]
    if fitting:
        return spare.pop(min(fitting, key=lambda index: spare[index].nbytes))
    block = np.empty(size + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return block[start : start + size]


def split(proto: onnx.ModelProto) -> list[onnx.ModelProto]:
    """The graph cut into models of `_OUTPUTS` outputs, or a little more, that run one after another.

    Args:
        proto: Its nodes are sorted.

    Returns:
        Models whose outputs are those of `proto` that are made in them, and what later ones read.
    """
    graph, types = proto.graph, _crossing_types(proto)
    wanted = {value.name for value in graph.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    read = [reads(node) for node in graph.node]
    inputs = {value.name for value in graph.input} - weights.keys()
    known = inputs | {name for node in graph.node for name in node.output}
    last = {name: index for index, names in enumerate(read) for name in names}

    empty = onnx.ModelProto()
    empty.CopyFrom(proto)
    for entries in (empty.graph.node, empty.graph.initializer, empty.graph.input, empty.graph.output):
        del entries[:]
    del empty.graph.value_info[:]
    pieces: list[onnx.ModelProto] = []
    begin, alive, given = 0, set[str](), 0  # the piece's first node; what it must not cut; its outputs
    for index, node in enumerate(graph.node):
        given += len(wanted.intersection(node.output))
        alive = {name for name in alive.union(node.output) if last.get(name, -1) > index}
        end = index + 1 == len(graph.node)
        if not end and (given < _OUTPUTS or not all(name in types for name in alive)):
            continue
        piece = onnx.ModelProto()
        piece.CopyFrom(empty)
        part, nodes = piece.graph, graph.node[begin : index + 1]
        part.node.extend(nodes)
        used = set[str]().union(*read[begin : index + 1])
        made = {name for node in nodes for name in node.output if name}
        # What no node makes, the optimizer having folded it, is the first piece's to give.
        gives = (made & (wanted | alive)) | (set() if pieces else wanted - known)
        part.initializer.extend(tensor for name, tensor in weights.items() if name in used | gives)
        part.input.extend(types[name] for name in sorted((used & known) - made))
        part.output.extend(types.get(name) or onnx.ValueInfoProto(name=name) for name in sorted(gives))
        pieces.append(piece)
        begin, given = index + 1, 0
    return pieces or [proto]


def reads(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those that its subgraphs take from outside among them."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names |= reads(inner)
            names |= {value.name for value in graph.output}
    return names


def _crossing_types(proto: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """What may go from one session to the next: tensors whose type and rank are written down, and that numpy has.

    Sizes that are written down are no help here, and wrong in many a file.
    """
    graph = proto.graph
    found: dict[str, onnx.ValueInfoProto] = {}
    for value in (*graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.elem_type in _CROSSING and kind.HasField("shape"):
            found[value.name] = make_tensor_value_info(value.name, kind.elem_type, [None] * len(kind.shape.dim))
    for node in graph.node:
        if node.domain == "com.microsoft.nchwc":  # of blocked images nothing is written down, and all are like this
            for name in node.output:
                found.setdefault(name, make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 4))
    return found | {value.name: value for value in graph.input}
