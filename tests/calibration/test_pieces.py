"""Graphs that run in pieces: what each of them gives is what the whole gives, to the bit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from trtforge.calibration.pieces import Pieces, split
from trtforge.runtime.errors import ParityError
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner

CHAIN = """agraph (float[n, 3] x, bool c) => (
    float[n, 3] v0, float[n, 3] v1, float[n, 3] v2, float[n, 3] v3, float[n, 3] v4, float[n, 3] v5, float[n, 3] v6,
    float[n, 3] v7, float[n, 3] v8, float[n, 3] v9) <float[n, 3] hidden, float[3] w = {1, 2, 3}> {
    v0 = Add(x, w)
    hidden = Mul(v0, w)
    v1 = Sin(hidden)
    v2 = Cos(v1)
    v3 = Add(v2, w)
    v4 = Mul(v3, v0)
    v5 = Neg(v4)
    v6 = If <then_branch = g1 () => (float[n, 3] t) { t = Add(v2, hidden) },
             else_branch = g2 () => (float[n, 3] e) { e = Sub(v5, hidden) }> (c)
    v7 = Exp(v6)
    v8 = Add(v7, x)
    v9 = Mul(v8, v0)
}"""
NAMES = {f"v{index}": f"tensor {index}" for index in range(10)}


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 20]> ' + text)


def runner(proto: onnx.ModelProto) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(proto.SerializeToString(), optimize=False, threads=1)


def feeds(seed: int, rows: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((rows, 3)).astype(np.float32), "c": np.array(seed % 2 == 0)}


def assert_whole(found: list[dict[str, np.ndarray]], expected: dict[str, np.ndarray]) -> None:
    together = {name: array for part in found for name, array in part.items()}
    assert together.keys() == {NAMES[name] for name in expected}
    for name, array in expected.items():
        np.testing.assert_array_equal(together[NAMES[name]], array)


def test_pieces_give_what_the_whole_gives() -> None:
    proto = parse(CHAIN)
    parts = split(proto)
    assert [sum(name in NAMES for name in (v.name for v in part.graph.output)) for part in parts] == [4, 4, 2]
    whole, pieces = runner(proto), Pieces([runner(part) for part in parts], NAMES)
    read = pieces.reader()
    # The same shapes again and again, then others, then the first once more.
    for seed, rows in enumerate([2, 2, 2, 2, 5, 1, 2, 2]):
        given = feeds(seed, rows)
        kept = {name: array.copy() for name, array in given.items()}
        expected = whole.run(given)
        assert_whole(list(pieces.run(given)), expected)
        # Before the next piece runs: it may write over what this one gave.
        assert_whole([{name: array.copy() for name, array in part.items()} for part in read(given)], expected)
        for name, array in given.items():
            np.testing.assert_array_equal(array, kept[name])


def test_tensors_come_in_the_arrays_of_the_last_time_which_share_memory() -> None:
    read = Pieces([runner(part) for part in split(parse(CHAIN))], NAMES).reader()
    list(read(feeds(0, 100)))
    first, again = list(read(feeds(1, 100))), list(read(feeds(2, 100)))
    for one, other in zip(first, again, strict=True):
        assert all(other[name] is array for name, array in one.items())
    assert any(np.shares_memory(a, b) for a in first[0].values() for b in first[1].values())
    assert len({array.ctypes.data for part in first for array in part.values()}) < len(NAMES)


def test_no_cut_goes_through_what_has_no_known_type() -> None:
    proto = parse(CHAIN)
    hidden = [value for value in proto.graph.value_info if value.name == "hidden"]
    proto.graph.value_info.remove(hidden[0])
    parts = split(proto)  # `hidden` is read until v6 is made
    assert [sum(value.name in NAMES for value in part.graph.output) for part in parts] == [7, 3]
    assert_whole(list(Pieces([runner(part) for part in parts], NAMES).run(feeds(0))), runner(proto).run(feeds(0)))


def test_outputs_that_no_node_makes() -> None:
    proto = parse("agraph (float[2] x) => (float[2] v0, float[2] v1) <float[2] v1 = {1, 2}> { v0 = Neg(x) }")
    expected = {"v0": np.array([-3, -4], np.float32), "v1": np.array([1, 2], np.float32)}
    given = {"x": np.array([3, 4], np.float32)}
    read = Pieces([runner(part) for part in split(proto)], NAMES).reader()
    for _ in range(3):
        assert_whole(list(read(given)), expected)
    del proto.graph.node[:], proto.graph.output[0]
    assert [part.graph.output[0].name for part in split(proto)] == ["v1"]


def test_shapes_that_depend_on_values_get_fresh_memory() -> None:
    text = """agraph (float[n] x) => (float[n] v0, float[k] v1, float[n] v2) {
        v0 = Identity(x) i = NonZero(x) j = Squeeze(i) v1 = Gather(v0, j) v2 = Neg(v0)
    }"""
    first, second = parse(text), parse(text)
    del first.graph.node[1:], first.graph.output[1:]
    del second.graph.node[0], second.graph.output[0]
    second.graph.input.add().CopyFrom(first.graph.output[0])
    read = Pieces([runner(first), runner(second)], NAMES).reader()
    for values in ([1, 0, 2], [3, 0, 4], [6, 7, 8], [9, 0, 1]):
        found = [dict(part) for part in read({"x": np.array(values, np.float32)})]
        assert found[0]["tensor 0"].tolist() == values
        assert found[1]["tensor 1"].tolist() == [value for value in values if value]
        assert found[1]["tensor 2"].tolist() == [-value for value in values]


def test_what_cannot_run_says_so() -> None:
    text = "agraph (float[n] x, float[m] y) => (float[k] v0) { v0 = Add(x, y) }"
    read = Pieces([runner(parse(text))], NAMES).reader()
    with pytest.raises(ParityError, match="failed on inputs of shape"):
        list(read({"x": np.ones(2, np.float32), "y": np.ones(3, np.float32)}))
