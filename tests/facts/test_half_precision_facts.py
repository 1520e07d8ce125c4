"""Facts about half precision that shape converter/assign.py, validation/emulate.py and runtime/; RTX 1.6 and 1.7."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from trtforge.runtime.errors import BuildError
from trtforge.runtime.trt.build import BuildRequest, build_engine

KINDS = {"float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ALONE = {
    "ConvTranspose": "y = ConvTranspose(x, w)",
    "GRU": "s = Squeeze(x, one) h, y = GRU<hidden_size = 4>(s, gw, gr)",
    "HardSwish": "y = HardSwish(x)",
    "LpNormalization": "y = LpNormalization(x)",
    "LpPool": "y = LpPool<kernel_shape = [2, 2]>(x)",
    "MeanVarianceNormalization": "y = MeanVarianceNormalization(x)",
    "Mish": "y = Mish(x)",
    "RandomNormal": "r = RandomNormal<dtype = NUMBER, shape = [1, 1, 4, 4]>() y = Add(x, r)",
    "RandomNormalLike": "r = RandomNormalLike(x) y = Add(x, r)",
    "RandomUniform": "r = RandomUniform<dtype = NUMBER, shape = [1, 1, 4, 4]>() y = Add(x, r)",
    "RandomUniformLike": "r = RandomUniformLike(x) y = Add(x, r)",
    "Shrink": "y = Shrink(x)",
}


def built(body: str, kind: str, folder: Path, inputs: str = "{}[1,1,4,4] x") -> bool:
    pytest.importorskip("tensorrt_rtx")
    number = {"float": 1, "float16": 10, "bfloat16": 16}[kind]
    text = f"g ({inputs.replace('{}', kind)}) => ({kind}[a,b,c,d] y) {{ {body.replace('NUMBER', str(number))} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> {text}')
    if "GRU" in body:
        proto.graph.output[0].type.tensor_type.shape.dim.pop()
    weights = {"w": (1, 1, 3, 3), "gw": (1, 12, 4), "gr": (1, 12, 4)}
    for name, shape in weights.items():
        if name in body:
            array = np.ones(shape).astype(KINDS[kind])
            tensor = proto.graph.initializer.add(name=name, dims=shape, data_type=number)
            tensor.raw_data = array.tobytes()
    if "one" in body:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one"))
    onnx.save(proto, folder / "m.onnx")
    try:
        build_engine(BuildRequest(folder / "m.onnx", folder / "m.engine", "tensorrt-rtx", (), tf32=False))
    except BuildError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("op", ALONE)
def test_what_assign_py_keeps_out_of_bfloat16_does_not_build_in_it(op: str, tmp_path: Path) -> None:
    assert built(ALONE[op], "float", tmp_path), "the probe itself is wrong"
    assert built(ALONE[op], "float16", tmp_path) is (op != "MeanVarianceNormalization")
    assert not built(ALONE[op], "bfloat16", tmp_path), f"take {op} out of _REFUSED in converter/assign.py"


@pytest.mark.slow
def test_grids_are_of_the_same_type_as_pictures_though_onnx_lets_them_differ(tmp_path: Path) -> None:
    """Why `GridSample` converts its grid, coordinates though they are."""
    body = "y = GridSample(x, g)"
    assert built(body, "float16", tmp_path, "{}[1,1,4,4] x, {}[1,4,4,2] g")
    assert not built(body, "float16", tmp_path, "{}[1,1,4,4] x, float[1,4,4,2] g")


def test_clones_share_type_objects_with_the_original() -> None:
    """Why types are replaced and never changed in place (converter/casts.py, validation/emulate.py)."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([1]))
    node = ir.node("Relu", [x], outputs=[ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT16))])
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 20}), ir_version=10)
    model.clone().graph.inputs[0].dtype = ir.DataType.FLOAT
    assert x.dtype == ir.DataType.FLOAT, "clones own their types now: `value.dtype = …` would do"


def test_onnxruntime_refuses_masks_that_broadcast_over_rows() -> None:
    """Why runtime/attention_masks.py exists."""
    import onnxruntime

    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23]> g (float[1,1,3,4] q, float[1,1] m) => (float[1,1,3,4] y)'
        "{ y = Attention(q, q, q, m) }"
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="inconsistent q_sequence_length"):
        session.run(None, {"q": np.ones((1, 1, 3, 4), np.float32), "m": np.ones((1, 1), np.float32)})
