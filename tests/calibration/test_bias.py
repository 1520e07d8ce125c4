"""Biases: whatever form they have, an addition reaches the output, and nobody else's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from trtforge.calibration.bias import apply_corrections

NETWORK = """(float[n, 3, 12, 12] x) => (float[n, 4] y, float[n, 4, 12, 12] m) {
    a = Conv<pads=[1, 1, 1, 1]>(x, w1, shared)
    c = Conv<pads=[1, 1, 1, 1], group=8>(a, w2)
    e = Conv(c, w3, shared)
    h = GlobalAveragePool(e)
    i = Flatten(h)
    y = Gemm<transB=1, beta=2.0>(i, w5, last)
    j = MatMul(x, w6)
    k = Add(b6, j)
    l = MatMul(k, w7)
    m = Conv(l, w8, computed)
    computed = Identity(never)
    never = Relu(four)
}""".replace("    computed = Identity(never)\n    never = Relu(four)\n", "").replace("computed", "four")
WEIGHTS = {
    "w1": (8, 3, 3, 3), "w2": (8, 1, 3, 3), "w3": (8, 8, 1, 1), "w5": (4, 8), "w6": (12, 12), "b6": (12,),
    "w7": (12, 12), "w8": (4, 3, 1, 1), "shared": (8,), "last": (4,), "four": (4,),
}  # fmt: skip
Parse = Callable[..., ir.Model]
Run = Callable[..., dict[str, np.ndarray]]


@pytest.fixture
def graph(parse_graph: Parse) -> ir.Model:
    return parse_graph(NETWORK, WEIGHTS)


@pytest.mark.parametrize(
    ("node", "tensor", "channels", "axis"),
    [("Conv#0", "a", 8, 1), ("Conv#1", "c", 8, 1), ("Gemm#0", "y", 4, 1), ("MatMul#0", "k", 12, 3)],
)
def test_what_is_added_reaches_the_output(
    graph: ir.Model, node: str, tensor: str, channels: int, axis: int, run_model: Run, random_feeds: Callable[..., dict]
) -> None:
    feeds = random_feeds(graph)
    extra = [] if tensor == "y" else [tensor]
    before = run_model(graph, feeds, extra)[tensor]
    delta = np.arange(1, channels + 1, dtype=np.float32)
    assert apply_corrections(graph, {node: delta, "else#0": delta}) == (node,)
    added = run_model(graph, feeds, extra)[tensor] - before
    shape = [-1 if i == axis else 1 for i in range(added.ndim)]
    np.testing.assert_allclose(added, np.broadcast_to(delta.reshape(shape), added.shape), atol=1e-4)


def test_a_shared_bias_is_copied(graph: ir.Model, run_model: Run, random_feeds: Callable[..., dict]) -> None:
    feeds = random_feeds(graph)
    before = run_model(graph, feeds, ["e", "c"])
    apply_corrections(graph, {"Conv#2": np.ones(8, np.float32)})
    after = run_model(graph, feeds, ["e", "c"])
    np.testing.assert_array_equal(after["c"], before["c"])
    np.testing.assert_allclose(after["e"], before["e"] + 1, atol=1e-5)


def test_a_second_correction_adds_up(graph: ir.Model) -> None:
    for _ in range(2):
        apply_corrections(graph, {"Conv#1": np.ones(8, np.float32)})
    node = next(node for node in graph.graph if node.name == "Conv#1")
    assert node.inputs[2] is not None
    assert node.inputs[2].const_value is not None
    np.testing.assert_array_equal(node.inputs[2].const_value.numpy(), np.full(8, 2, np.float32))


def test_a_matmul_without_an_add_of_its_own_is_left(graph: ir.Model) -> None:
    assert apply_corrections(graph, {"MatMul#1": np.ones(12, np.float32)}) == ()
