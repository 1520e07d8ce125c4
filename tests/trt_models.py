"""ONNX files in text form for tests that build engines; float models only, small, one fact each."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser

CONV = """g (float[batch,2,8,8] x) => (float[batch,3,6,6] y) <float[3,2,3,3] w> {
  [conv] c = Conv(x, w)
  [act] y = Relu(c)
}"""
STATIC = "g (float[2,4] x) => (float[2,4] y) { y = Relu(x) }"
# Unsupported at three depths: Det is met first, NonZero only when the rest is clean.
UNSUPPORTED = """g (float[2,3,3] x) => (float[n,m] y) {
  [a] a = Relu(x)
  [b] d = Det(a)
  [c] u = Unique(d)
  [d] i = NonZero(u)
  y = Cast<to = 1>(i)
}"""
NON_MAX_SUPPRESSION = """g (float[1,10,4] b, float[1,2,10] s) => (int32[n,3] y)
  <int64[1] most = {3}, float[1] iou = {0.5}, float[1] least = {0.5}> {
  [head] o = NonMaxSuppression(b, s, most, iou, least)
  y = Cast<to = 6>(o)
}"""
# A batch that the exporter froze at 2.
BAKED = """g (float[batch,6] x) => (float[a,b] y) <int64[2] s = {2, 6}> {
  [view] r = Reshape(x, s)
  y = Relu(r)
}"""
SELF_ATTENTION = """g (float16[2,4,16,32] x) => (float16[2,4,16,32] y) {
  [attn] y = Attention(x, x, x)
}"""
ATTENTION = """g (float16[2,4,16,32] q, float16[2,4,16,32] k, float16[2,4,16,32] v) => (float16[2,4,16,32] y) {
  [attn] y = Attention(q, k, v)
}"""
MIXED_TYPES = """g (float[2] x) => (float16[2] y) <float[2] k = {1, 2}> {
  h = Cast<to = 10>(x)
  [add] y = Add(h, k)
}"""
INT8_CONV = """g (float[batch,2,8,8] x) => (float[batch,3,6,6] y)
  <float s = {0.05}, int8 z = {0}, float[3,2,3,3] w> {
  xq = QuantizeLinear(x, s, z)
  xd = DequantizeLinear(xq, s, z)
  wq = QuantizeLinear(w, s, z)
  wd = DequantizeLinear(wq, s, z)
  [conv] y = Conv(xd, wd)
}"""
SHAPE_INPUT = "g (float[2,6] x, int64[2] s) => (float[a,b] y) { y = Reshape(x, s) }"


def write(folder: Path, text: str, *, opset: int = 20, name: str = "model.onnx") -> Path:
    """Parses `text` and writes it.

    Nodes are named like the converter's ids, `m.<label>/<OpType>#0` for `[label]` and `m/<OpType>#k` without one.
    Values between the angle brackets that have no values and that no node makes become weights: a ramp.
    """
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    graph = model.graph
    count: dict[str, int] = {}
    for node in graph.node:
        number = count.setdefault(node.op_type, 0)
        node.name = f"m.{node.name}/{node.op_type}#0" if node.name else f"m/{node.op_type}#{number}"
        count[node.op_type] += 1
    made = {output for node in graph.node for output in node.output}
    for value in list(graph.value_info):
        if value.name not in made:
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            ramp = (np.arange(math.prod(shape)) % 7 - 3).reshape(shape) / 8
            graph.initializer.append(onnx.numpy_helper.from_array(ramp.astype(np.float32), value.name))
            graph.value_info.remove(value)
    path = folder / name
    onnx.save(model, path)
    return path
