"""YAML files: what is read, and what is said about those that are wrong."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtforge.converter import cli
from trtforge.converter.config import ConversionConfig, read_config
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.specs import DimRange, ValueRange

CONFIGS = Path(__file__).parents[2] / "configs"

GOOD = """\
version: 1
defaults:
  target: {backend: tensorrt-rtx}
models:
  encoder:
    source: {factory: 'my_models:encoder', kwargs: {layers: 6}, checkpoint: weights/encoder.safetensors}
    dims: {batch: [1, 8, 32], seq: [16, 128, 512]}
    inputs:
      ids: {dtype: int64, shape: [batch, seq], values: [0, 30521]}
      mask: {dtype: bool, shape: [batch, seq], values: true}
    outputs: [logits, hidden]
    precision: {default: fp16, rules: [{module: head, precision: fp32, reason: logits are wide}]}
    validation: {loader: 'my_data:samples', tolerance: {sqnr_db: 40, max_abs_over_std: 0.05}}
    target: {compute_capabilities: [8.6, 8.9, 12.0]}
"""


def read(folder: Path, text: str) -> tuple[ConversionConfig, ...]:
    path = folder / "models.yaml"
    path.write_text(text, encoding="utf-8")
    return read_config(path)


def message(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, text)
    return str(caught.value)


def test_reads_every_key(tmp_path: Path) -> None:
    (config,) = read(tmp_path, GOOD)
    assert config.name == "encoder"
    assert config.source.checkpoint == tmp_path / "weights/encoder.safetensors"
    assert config.profiles == ({"batch": DimRange(1, 8, 32), "seq": DimRange(16, 128, 512)},)
    assert [(s.name, s.dtype, s.shape, s.values) for s in config.inputs] == [
        ("ids", "int64", ("batch", "seq"), ValueRange(0, 30521)),
        ("mask", "bool", ("batch", "seq"), ValueRange(1, 1)),
    ]
    assert config.plan.default == "fp16"
    assert config.plan.rules[0].module == "head"
    assert config.validation.tolerance == {"sqnr_db": 40, "max_abs_over_std": 0.05}
    assert config.target.backend == "tensorrt-rtx"
    assert config.target.compute_capabilities == ("8.6", "8.9", "12.0")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    assert {c.plan.default for c in read_config(path)} in ({"fp32", "fp16", "bf16"}, {"int8", "fp8"})


@pytest.mark.parametrize(
    ("old", "new", "line", "hint"),
    [
        ("    precision:", "    precison:", 12, "did you mean 'precision'"),
        ("version: 1", "vershun: 1", 1, "did you mean 'version'"),
        ("checkpoint:", "checkpont:", 6, "did you mean 'checkpoint'"),
        ("target: {backend:", "target: {backed:", 3, "did you mean 'backend'"),
        ("sqnr_db: 40", "snr_db: 40", 13, "did you mean 'sqnr_db'"),
        ("dtype: int64, shape", "dtype: int64, shap", 9, "did you mean 'shape'"),
        ("dtype: int64", "dtype: long", 9, "int64"),
        ("default: fp16", "default: fp61", 5, "fp16"),
        ("[1, 8, 32]", "[8, 1, 32]", 5, "min <= opt <= max"),
        ("[1, 8, 32]", "[0, 8, 32]", 5, "min <= opt <= max"),
        ("seq: [16, 128, 512]", "length: [16, 128, 512]", 5, "'seq'"),
        ("my_models:encoder", "my_models.encoder", 6, "must be package.module:function"),
        ("backend: tensorrt-rtx", "backend: tensorrt_rtx", 3, "tensorrt-rtx"),
        ("version: 1", "version: 2", 1, "1"),
        ("  encoder:\n", "  'a/b':\n", 5, "made of letters a to z"),
    ],
)
def test_wrong_key_or_value_names_its_line(tmp_path: Path, old: str, new: str, line: int, hint: str) -> None:
    assert old in GOOD
    said = message(tmp_path, GOOD.replace(old, new, 1))
    assert f"models.yaml:{line}:" in said
    assert hint in said


def test_duplicate_key(tmp_path: Path) -> None:
    assert "twice" in message(tmp_path, GOOD + "  encoder: {}\n")


def test_yaml_that_would_run_code_is_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    said = message(tmp_path, f"version: !!python/object/apply:os.mkdir ['{marker}']\n")
    assert "models.yaml:1:" in said
    assert not marker.exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        read_config(tmp_path / "nothing.yaml")


def test_model_overrides_defaults_key_by_key(tmp_path: Path) -> None:
    text = GOOD.replace("backend: tensorrt-rtx}", "backend: tensorrt-rtx, opset: 20}")
    (config,) = read(tmp_path, text.replace("compute_capabilities: [8.6, 8.9, 12.0]", "opset: 19"))
    assert (config.target.backend, config.target.opset) == ("tensorrt-rtx", 19)


def test_matrix_multiplies_and_names(tmp_path: Path) -> None:
    configs = read(tmp_path, GOOD + "matrix: {precision: [fp32, bf16], target.opset: [18, 20]}\n")
    assert [c.name for c in configs] == [
        "encoder-fp32-18",
        "encoder-fp32-20",
        "encoder-bf16-18",
        "encoder-bf16-20",
    ]
    assert [(c.plan.default, c.target.opset) for c in configs][2] == ("bf16", 18)


def test_several_profiles(tmp_path: Path) -> None:
    dims = "[{batch: [1, 1, 1], seq: [1, 64, 64]}, {batch: [2, 8, 32], seq: [16, 128, 512]}]"
    (config,) = read(tmp_path, GOOD.replace("{batch: [1, 8, 32], seq: [16, 128, 512]}", dims))
    assert [p["seq"].max for p in config.profiles] == [64, 512]


def test_precision_from_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("default: bf16\n")
    text = GOOD[: GOOD.index("    precision:")] + "    precision: plan.yaml\n"
    (config,) = read(tmp_path, text)
    assert config.plan.default == "bf16"


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 99), st.floats(allow_nan=False), st.text(max_size=6))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=5)  # fmt: skip  # noqa: E501


def paths_in(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(path for key, value in items for path in paths_in(value, (*at, key)))]


def fuzz(data: st.DataObject) -> Any:
    tree: Any = copy.deepcopy(yaml.safe_load(GOOD))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(paths_in(tree)[1:]))
        inner = tree
        for key in parents:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[last] = data.draw(VALUES)
        elif isinstance(inner, dict):
            inner[data.draw(st.text(max_size=8))] = inner.pop(last)
        if not tree:
            break
    return tree


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_configuration_is_read_or_refused_with_a_line(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(fuzz(data), allow_unicode=True), encoding="utf-8")
    said = "fuzzed.yaml: nothing"
    try:
        read_config(path)
    except ConfigError as error:
        said = str(error)
    assert "fuzzed.yaml:" in said


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_thousand_fuzzed_configurations_are_exit_2_without_a_traceback(
    tmp_path: Path, data: st.DataObject, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(fuzz(data), allow_unicode=True), encoding="utf-8")
    # One that is still right lacks this model.
    monkeypatch.setattr(sys, "argv", ["trtforge", "convert", str(path), "--only", "none such"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "fuzzed.yaml" in said
    assert "Traceback" not in said
