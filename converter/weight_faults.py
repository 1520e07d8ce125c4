"""Faults in weights alone: the graph stays as it is, and another function is computed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtforge.converter.graph_edits import GraphEditor, choose, float_array, set_array

__all__ = ["corrupt_weight", "double_scale", "lose_bias", "swap_channels", "transpose_weight", "wrong_weights"]

Random = np.random.Generator


def swap_channels(edit: GraphEditor, random: Random, _: object) -> str | None:
    """Two channels of a weight, or its two halves, change places."""
    found = [(w, axis) for w in edit.weights(1) for axis, n in enumerate(_shape(w)[:2]) if n >= 2]
    if not found:
        return None
    weight, axis = choose(random, found)
    array = float_array(weight)
    size = array.shape[axis]
    order = np.arange(size)
    if random.random() < 0.3:
        order, what = np.roll(order, size // 2), "halves"
    else:
        a, b = random.choice(size, 2, replace=False)
        order[[a, b]] = order[[b, a]]
        what = f"channels {a} and {b}"
    set_array(weight, np.take(array, order, axis))
    return f"{what} of {weight.name}, axis {axis}"


def double_scale(edit: GraphEditor, random: Random, _: object) -> str | None:
    """A weight, a scale, or one channel of it, is doubled or halved."""
    weights = edit.weights()
    if not weights:
        return None
    weight = choose(random, weights)
    array, factor = float_array(weight), choose(random, [2.0, 0.5])
    if array.ndim and random.random() < 0.5:
        channel = int(random.integers(array.shape[0]))
        array[channel] *= factor
        where = f"[{channel}]"
    else:
        array *= factor
        where = ""
    set_array(weight, array)
    return f"{weight.name}{where} times {factor:g}"


def transpose_weight(edit: GraphEditor, random: Random, _: object) -> str | None:
    """Two axes of one size of a weight change places."""
    found = []
    for weight in edit.weights(2):
        sizes = list(enumerate(_shape(weight)))
        found += [(weight, i, j) for n, (i, a) in enumerate(sizes) for j, b in sizes[n + 1 :] if a == b > 1]
    if not found:
        return None
    weight, i, j = choose(random, found)
    set_array(weight, np.swapaxes(float_array(weight), i, j))
    return f"axes {i} and {j} of {weight.name}"


def lose_bias(edit: GraphEditor, random: Random, _: object) -> str | None:
    """A vector (bias, scale or shift) becomes zero, in whole or in one channel."""
    vectors = [weight for weight in edit.weights(1) if len(_shape(weight)) == 1]
    if not vectors:
        return None
    weight = choose(random, vectors)
    array = float_array(weight)
    if random.random() < 0.5:
        channel = int(random.integers(len(array)))
        array[channel] = 0
        where = f"[{channel}]"
    else:
        array[:] = 0
        where = ""
    set_array(weight, array)
    return f"{weight.name}{where} is 0"


def corrupt_weight(edit: GraphEditor, random: Random, _: object) -> str | None:
    """One value of a weight has another sign, is zero, or has a bit of its exponent flipped."""
    weights = edit.weights(1)
    if not weights:
        return None
    weight = choose(random, weights)
    array = float_array(weight)
    at = np.unravel_index(int(random.integers(array.size)), array.shape)
    how = choose(random, ["negated", "zeroed", "times 4", "times 1/4"])
    array[at] *= {"negated": -1.0, "zeroed": 0.0, "times 4": 4.0, "times 1/4": 0.25}[how]
    set_array(weight, array)
    return f"{weight.name}{[int(i) for i in at]} {how}"


def wrong_weights(edit: GraphEditor, random: Random, _: object) -> str | None:
    """A layer has the weights of another one of the same shape."""
    weights = edit.weights(1)
    found = [(a, b) for a in weights for b in weights if a is not b and _shape(a) == _shape(b)]
    if not found:
        return None
    a, b = choose(random, found)
    set_array(a, float_array(b))
    return f"{a.name} has the values of {b.name}"


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return tuple(value.const_value.numpy().shape)
