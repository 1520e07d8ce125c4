"""Small ONNX models that every graph pass must survive: `for case in CORPUS`, each with inputs to run it on.

A pass over the corpus must keep it checker valid, keep ids, interface and onnxruntime's results, and be idempotent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import numpy_helper

Arrays = dict[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class Case:
    """A model and how to feed it.

    Attributes:
        name: For `pytest.mark.parametrize(..., ids=lambda case: case.name)`.
        make: Builds it anew on each call.
        feeds: Inputs for a batch size (and, where the model has one, a length of `batch + 3`).
    """

    name: str
    make: Callable[[], onnx.ModelProto]
    feeds: Callable[[int], Arrays]

    def proto(self) -> onnx.ModelProto:
        return self.make()

    def ir(self) -> ir.Model:
        return ir.from_proto(self.make())

    def prepared(self) -> ir.Model:
        """As the converter's passes leave it: cleaned, with ids and the types of all tensors."""
        from trtforge.converter.cleanup import clean
        from trtforge.converter.identity import identify
        from trtforge.converter.types import infer_types

        model = self.ir()
        clean(model)
        identify(model)
        infer_types(model)
        return model

    def expected(self, batch: int) -> Arrays:
        """What onnxruntime makes of it."""
        proto = self.make()
        for node in proto.graph.node:
            node.name = ""  # onnxruntime refuses the case whose nodes share a name
        return run_model(proto, self.feeds(batch))

    def __str__(self) -> str:
        return self.name


def run_model(model: onnx.ModelProto | ir.Model, feeds: Mapping[str, Any]) -> Arrays:
    """Outputs by name from onnxruntime without its graph optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


def _weights(seed: int, **shapes: tuple[int, ...]) -> Arrays:
    random = np.random.default_rng(seed)
    return {
        name: (random.standard_normal(shape) / math.sqrt(max(1, math.prod(shape[1:])))).astype(np.float32)
        for name, shape in shapes.items()
    }


def _model(
    text: str, *, opset: int = 20, weights: Mapping[str, Any] | None = None, ir_version: int = 9, unnamed: bool = False
) -> onnx.ModelProto:
    """Parses `graph (inputs) => (outputs) { … }`, adds initializers and calls nodes `n0`, `n1`, … in each graph."""
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "local" : 1]>\n{text}')
    for name, array in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    if not unnamed:
        _name_nodes(model.graph, "n")
    if not model.functions:
        del model.opset_import[1]
    return model


def _name_nodes(graph: onnx.GraphProto, prefix: str) -> None:
    for index, node in enumerate(graph.node):
        node.name = node.name or f"{prefix}{index}"
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _name_nodes(attribute.g, f"{node.name}_{attribute.name}_")


def _floats(name: str, *tail: int, scale: float = 1.0) -> Callable[[int], Arrays]:
    def feeds(batch: int) -> Arrays:
        random = np.random.default_rng([batch, len(tail)])
        return {name: (scale * random.standard_normal((batch, *tail))).astype(np.float32)}

    return feeds


def _sequence_feeds(batch: int) -> Arrays:
    random = np.random.default_rng(batch)
    return {"x": random.standard_normal((batch, batch + 3, 4)).astype(np.float32)}


def _mlp() -> onnx.ModelProto:
    text = """g (float[batch, 8] x) => (float[batch, 4] y) {
        h = Gemm <transB = 1> (x, w1, b1)
        r = Relu(h)
        y = Gemm <transB = 1> (r, w2, b2)
    }"""
    return _model(text, weights=_weights(0, w1=(16, 8), b1=(16,), w2=(4, 16), b2=(4,)))


def _conv_prelu() -> onnx.ModelProto:
    text = """g (float[batch, 3, 8, 8] x) => (float[batch, 4, 8, 8] y) {
        c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
        p = PRelu(c, slope)
        d = Conv <pads = [0, 0, 0, 0]> (p, w2)
        y = Add(d, p)
    }"""
    weights = _weights(1, w=(4, 3, 3, 3), b=(4,), w2=(4, 4, 1, 1)) | {"slope": np.full((4, 1, 1), 0.25, np.float32)}
    return _model(text, weights=weights)


def _if_body() -> onnx.ModelProto:
    text = """g (float[batch, 4] x) => (float[batch, 4] y) {
        zero = Constant <value = float {0.0}> ()
        s = ReduceSum <keepdims = 0> (x)
        c = Greater(s, zero)
        y = If (c) <
            then_branch = then_g () => (float[batch, 4] t) {
                half = Constant <value_float = 0.5> ()
                m = MatMul(x, w)
                t = Mul(m, half)
            },
            else_branch = else_g () => (float[batch, 4] e) {
                m2 = MatMul(x, w)
                e = Tanh(m2)
            }
        >
    }"""
    return _model(text, weights=_weights(2, w=(4, 4)))


def _loop_body() -> onnx.ModelProto:
    text = """g (float[batch, 4] x) => (float[batch, 4] y, float[steps, batch, 4] trace) {
        trips = Constant <value = int64 {3}> ()
        go = Constant <value = bool {1}> ()
        y, trace = Loop (trips, go, x) <
            body = loop_g (int64 i, bool keep, float[batch, 4] h) =>
                          (bool keep_out, float[batch, 4] h_out, float[batch, 4] scanned) {
                keep_out = Identity(keep)
                m = MatMul(h, w)
                f = Cast <to = 1> (i)
                a = Add(m, f)
                h_out = Tanh(a)
                scanned = Identity(h_out)
            }
        >
    }"""
    return _model(text, weights=_weights(3, w=(4, 4)))


def _nested_bodies() -> onnx.ModelProto:
    text = """g (float[batch, 4] x) => (float[batch, 4] y) {
        trips = Constant <value = int64 {2}> ()
        go = Constant <value = bool {1}> ()
        y = Loop (trips, go, x) <
            body = loop_g (int64 i, bool keep, float[batch, 4] h) => (bool keep_out, float[batch, 4] h_out) {
                keep_out = Identity(keep)
                one = Constant <value = int64 {1}> ()
                second = Equal(i, one)
                h_out = If (second) <
                    then_branch = then_g () => (float[batch, 4] t) { t = MatMul(h, w) },
                    else_branch = else_g () => (float[batch, 4] e) { a = MatMul(x, w)  e = Add(a, h) }
                >
            }
        >
    }"""
    return _model(text, weights=_weights(4, w=(4, 4)))


def _shared_weights() -> onnx.ModelProto:
    text = """g (int64[batch, length] ids) => (float[batch, length, 10] logits) {
        e = Gather(table, ids)
        h = MatMul(e, w)
        h2 = MatMul(h, w)
        t = Transpose <perm = [1, 0]> (table)
        logits = MatMul(h2, t)
    }"""
    weights = _weights(5, table=(10, 6), w=(6, 6))
    return _model(text, weights=weights | {"unused": np.ones(3, np.float32)})


def _ids(batch: int) -> Arrays:
    return {"ids": np.random.default_rng(batch).integers(0, 10, (batch, batch + 3))}


def _unnamed() -> onnx.ModelProto:
    text = """g (float[batch, 4] x) => (float[batch, 4] y) {
        a = MatMul(x, w)
        b = Relu(a)
        c = MatMul(b, w)
        y = Relu(c)
    }"""
    return _model(text, weights=_weights(6, w=(4, 4)), unnamed=True)


def _duplicate_names() -> onnx.ModelProto:
    model = _unnamed()
    for node in model.graph.node:
        node.name = "layer"
    model.graph.node[3].name = "last"
    return model


def _initializers_in_inputs() -> onnx.ModelProto:
    text = """g (float[batch, 4] x, float[4, 4] w, float[4] b) => (float[batch, 4] y) {
        m = MatMul(x, w)
        y = Add(m, b)
    }"""
    return _model(text, opset=13, weights=_weights(7, w=(4, 4), b=(4,)), ir_version=7)


def _old_softmax() -> onnx.ModelProto:
    """At opset 11 Softmax flattens from its axis on: a wrong version conversion changes results."""
    text = """g (float[batch, 3, 4] x) => (float[batch, 3, 4] y, float[batch, 4] z) {
        n = BatchNormalization(x, scale, bias, mean, var)
        y = Softmax <axis = 1> (n)
        r = ReduceSum <axes = [1], keepdims = 0> (n)
        z = Clip(r, low, high)
    }"""
    ones = {"scale": np.full(3, 1.5, np.float32), "bias": np.zeros(3, np.float32), "mean": np.zeros(3, np.float32)}
    more = {"var": np.full(3, 0.5, np.float32), "low": np.float32(-2), "high": np.float32(2)}
    return _model(text, opset=11, weights=ones | more, ir_version=6)


def _scatter() -> onnx.ModelProto:
    """Swin's attention mask: a ConstantOfShape of the input's size that ScatterND writes into."""
    text = """g (float[batch, 4, 4] x) => (float[batch, 4, 4] y) {
        shape = Shape(x)
        canvas = ConstantOfShape <value = float[1] {0.0}> (shape)
        zero = Constant <value = int64[1, 1] {0}> ()
        row = Gather <axis = 0> (x, at)
        filled = ScatterND(canvas, zero, row)
        m = MatMul(x, w)
        y = Add(m, filled)
    }"""
    return _model(text, weights=_weights(8, w=(4, 4)) | {"at": np.array([0], np.int64)})


def _einsum() -> onnx.ModelProto:
    text = """g (float[B, 2, 3, 4] q, float[B, 2, 3, 4] k) => (float[B, 2, 3, 4] y) {
        scores = Einsum <equation = "B H I D, B H J D -> B H I J"> (q, k)
        p = Softmax <axis = -1> (scores)
        y = Einsum <equation = "BHIJ,BHJD->BHID"> (p, k)
    }"""
    return _model(text)


def _qk(batch: int) -> Arrays:
    random = np.random.default_rng(batch)
    return {name: random.standard_normal((batch, 2, 3, 4)).astype(np.float32) for name in ("q", "k")}


def _functions() -> onnx.ModelProto:
    text = """g (float[batch, 4] x) => (float[batch, 4] y) {
        a = local.block <slope = 0.1> (x, w)
        y = local.block <slope = 0.3> (a, w)
    }
    <domain: "local", opset_import: ["" : 20, "local" : 1]> block <slope> (x, w) => (y) {
        m = MatMul(x, w)
        l = LeakyRelu <alpha: float = @slope> (m)
        y = local.twice(l)
    }
    <domain: "local", opset_import: ["" : 20]> twice (x) => (y) { y = Add(x, x) }
    """
    return _model(text, weights=_weights(9, w=(4, 4)))


def _identities() -> onnx.ModelProto:
    text = """g (float[batch, 4] x) => (float[batch, 4] same, float[batch, 4] y, float[batch, 4] z, float[4] c) {
        same = Identity(x)
        i = Identity(x)
        m = MatMul(i, w)
        y = Identity(m)
        z = Identity(m)
        c = Identity(b)
    }"""
    return _model(text, weights=_weights(10, w=(4, 4), b=(4,)))


def _repeats() -> onnx.ModelProto:
    """Equal subexpressions, equal constants under two names, and nodes that nothing uses."""
    text = """g (float[batch, 4] x) => (float[batch, 4] y) {
        two = Constant <value_float = 2.0> ()
        also = Constant <value = float {2.0}> ()
        a = Mul(x, two)
        b = Mul(x, also)
        unused = Exp(a)
        s = Add(a, b)
        axes = Constant <value_ints = [1]> ()
        n = ReduceMean(s, axes)
        y = Sub(s, n)
    }"""
    return _model(text)


def _masked_attention() -> onnx.ModelProto:
    """A mask of the lowest float32, which fp16 cannot hold, a bool input, and a Softmax."""
    text = """g (float[batch, length, 4] x, bool[batch, length] mask) => (float[batch, length, 4] y) {
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        t = Transpose <perm = [0, 2, 1]> (k)
        s = MatMul(q, t)
        scaled = Div(s, two)
        axes = Constant <value_ints = [1]> ()
        m = Unsqueeze(mask, axes)
        w = Where(m, scaled, low)
        p = Softmax <axis = -1> (w)
        y = MatMul(p, x)
    }"""
    weights = _weights(11, wq=(4, 4), wk=(4, 4))
    return _model(text, weights=weights | {"two": np.float32(2), "low": np.float32(np.finfo(np.float32).min)})


def _masked(batch: int) -> Arrays:
    mask = np.ones((batch, batch + 3), bool)
    mask[:, batch + 1 :] = False
    return {**_sequence_feeds(batch), "mask": mask}


def _layer_norm() -> onnx.ModelProto:
    """A LayerNorm in parts on inputs of 300: the squares overflow fp16."""
    text = """g (float[batch, 8] x) => (float[batch, 8] y) {
        axes = Constant <value_ints = [-1]> ()
        mean = ReduceMean(x, axes)
        d = Sub(x, mean)
        two = Constant <value_float = 2.0> ()
        sq = Pow(d, two)
        var = ReduceMean(sq, axes)
        eps = Constant <value_float = 0.00001> ()
        v = Add(var, eps)
        std = Sqrt(v)
        n = Div(d, std)
        y = Mul(n, gamma)
    }"""
    return _model(text, weights={"gamma": np.linspace(0.5, 1.5, 8, dtype=np.float32)})


def _optional_inputs() -> onnx.ModelProto:
    text = """g (float[batch, 3, 4, 4] x) => (float[batch, 3, 8, 8] y) {
        c = Clip(x, , six)
        y = Resize <mode = "nearest"> (c, , scales)
    }"""
    weights = {"six": np.float32(0.5), "scales": np.array([1, 1, 2, 2], np.float32)}
    return _model(text, weights=weights)


def _lstm() -> onnx.ModelProto:
    text = """g (float[batch, length, 4] x) => (float[batch, length, 6] y) {
        t = Transpose <perm = [1, 0, 2]> (x)
        h, last, cell = LSTM <hidden_size = 3, direction = "bidirectional"> (t, w, r, b)
        p = Transpose <perm = [2, 0, 1, 3]> (h)
        y = Reshape(p, shape)
    }"""
    weights = _weights(12, w=(2, 12, 4), r=(2, 12, 3), b=(2, 24)) | {"shape": np.array([0, 0, 6], np.int64)}
    return _model(text, weights=weights)


def _mixed_types() -> onnx.ModelProto:
    """Shape arithmetic in int64, TopK's indices, a Range and casts around float operators."""
    text = """g (float[batch, 6] x) => (float[batch, 3] top, int64[batch, 3] at, float[batch, 6] ramp) {
        top, at = TopK(x, k)
        s = Shape(x)
        one = Constant <value = int64 {1}> ()
        n = Gather(s, one)
        zero = Constant <value = int64 {0}> ()
        r = Range(zero, n, one)
        f = Cast <to = 1> (r)
        ramp = Mul(x, f)
    }"""
    return _model(text, weights={"k": np.array([3], np.int64)})


def _quantized() -> onnx.ModelProto:
    """Explicit Q/DQ that came with the model."""
    text = """g (float[batch, 4] x) => (float[batch, 4] y) {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        wd = DequantizeLinear <axis = 1> (wq, ws, wz)
        y = MatMul(d, wd)
    }"""
    weights = {
        "s": np.float32(0.05), "z": np.int8(0), "ws": np.full(4, 0.01, np.float32), "wz": np.zeros(4, np.int8),
        "wq": np.random.default_rng(13).integers(-127, 127, (4, 4)).astype(np.int8),
    }  # fmt: skip
    return _model(text, weights=weights)


CORPUS: tuple[Case, ...] = (
    Case("mlp", _mlp, _floats("x", 8)),
    Case("conv_prelu", _conv_prelu, _floats("x", 3, 8, 8)),
    Case("if_body", _if_body, _floats("x", 4)),
    Case("loop_body", _loop_body, _floats("x", 4)),
    Case("nested_bodies", _nested_bodies, _floats("x", 4)),
    Case("shared_weights", _shared_weights, _ids),
    Case("unnamed", _unnamed, _floats("x", 4)),
    Case("duplicate_names", _duplicate_names, _floats("x", 4)),
    Case("initializers_in_inputs", _initializers_in_inputs, _floats("x", 4)),
    Case("old_softmax", _old_softmax, _floats("x", 3, 4)),
    Case("scatter", _scatter, _floats("x", 4, 4)),
    Case("einsum", _einsum, _qk),
    Case("functions", _functions, _floats("x", 4)),
    Case("identities", _identities, _floats("x", 4)),
    Case("repeats", _repeats, _floats("x", 4)),
    Case("masked_attention", _masked_attention, _masked),
    Case("layer_norm", _layer_norm, _floats("x", 8, scale=300.0)),
    Case("optional_inputs", _optional_inputs, _floats("x", 3, 4, 4)),
    Case("lstm", _lstm, _sequence_feeds),
    Case("mixed_types", _mixed_types, _floats("x", 6)),
    Case("quantized", _quantized, _floats("x", 4)),
)
