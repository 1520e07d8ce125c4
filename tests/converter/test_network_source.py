"""Networks of the user's own: built in the child, and refused wherever nothing would prove them."""

from __future__ import annotations

from pathlib import Path

import network_models
import pytest
import torch
import trt_models as models

import trtforge
from trtforge.converter.config import Source, read_config
from trtforge.converter.network import with_network
from trtforge.runtime.device import gpu_present
from trtforge.runtime.errors import BuildError, ConfigError
from trtforge.runtime.trt.build import BuildRequest, BuiltEngine, build_engine
from trtforge.runtime.trt.network import NetworkSource

pytest.importorskip("tensorrt_rtx")
TESTS = Path(__file__).parents[1]
PROFILE = {"input": ((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))}


def _build(folder: Path, function: str, **kwargs: object) -> BuiltEngine:
    reference = models.write(folder, models.STATIC)
    source = NetworkSource(f"network_models:{function}", kwargs, (TESTS,))
    request = BuildRequest(reference, folder / "net.engine", "tensorrt-rtx", (PROFILE,), tf32=False, network=source)
    return build_engine(request)


def test_the_functions_network_is_built(tmp_path: Path) -> None:
    network_models.save_weights(tmp_path / "w.npz")
    one = _build(tmp_path, "define", weights=str(tmp_path / "w.npz"))
    assert [(spec.name, spec.dtype) for spec in (*one.inputs, *one.outputs)] == [
        ("input", "float32"),
        ("output", "float32"),
    ]
    assert one.outputs[0].shape[1:] == (4, 6, 6)
    other = _build(tmp_path, "define", weights=str(tmp_path / "w.npz"), scale=2.0)
    assert other.sha256 != one.sha256


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("forget_output", "network_models:forget_output has no output"),
        ("fail", "network_models:fail raised KeyError: 'no such weight'"),
        ("absent", "raised AttributeError"),
    ],
)
def test_a_function_that_defines_nothing(tmp_path: Path, function: str, said: str) -> None:
    with pytest.raises(BuildError) as caught:
        _build(tmp_path, function)
    assert said in caught.value.what
    assert not (tmp_path / "net.engine").exists()


@pytest.mark.skipif(gpu_present(), reason="there it is proved")
def test_without_a_gpu_it_is_refused_before_the_export(tmp_path: Path) -> None:
    example = torch.randn(2, 3, 8, 8)
    with pytest.raises(BuildError, match="can only be proved by running it") as caught:
        trtforge.convert(network_models.make_module(), example, tmp_path / "net", network=network_models.define)
    assert "GPU" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    example, module = torch.randn(2, 3, 8, 8), network_models.make_module()
    with pytest.raises(ConfigError, match="there is no module 'network_model'") as caught:
        trtforge.convert(module, example, tmp_path / "net", network="network_model:define")
    assert "network_models" in caught.value.fix
    with pytest.raises(ConfigError, match="decides its own precision"):
        trtforge.convert(module, example, tmp_path / "net", network=network_models.define, precision="int8")
    with pytest.raises(ConfigError, match="another process cannot import"):
        with_network(Source(), lambda network, trt: None, None)
    with pytest.raises(ConfigError, match="JSON does not"):
        with_network(Source(), network_models.define, {"weights": torch.zeros(1)})


def test_yaml_names_it_beside_the_factory(tmp_path: Path) -> None:
    text = (
        "version: 1\nmodels:\n  net:\n"
        "    source: {%s, network: 'network_models:define', network_kwargs: {scale: 2.0}}\n"
        "    inputs: {input: {shape: [2, 3, 8, 8]}}\n"
    )
    file = tmp_path / "models.yaml"
    file.write_text(text % "factory: 'network_models:make_module'")
    (config,) = read_config(file)
    assert (config.source.network, config.source.network_kwargs) == ("network_models:define", {"scale": 2.0})
    file.write_text(text % "onnx: m.onnx")
    with pytest.raises(ConfigError, match="proved against PyTorch"):
        read_config(file)
