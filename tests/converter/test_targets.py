"""The target's options from YAML and Python to the engine and its manifest, and back at `trtforge build`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import trtforge
from trtforge.converter.config import read_config
from trtforge.converter.progress import Stages, ignore_events
from trtforge.converter.rebuild import build_artifact
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.trt.options import BuildOptions

YAML = """version: 1
models:
  small:
    source: {{factory: tiny_models:small}}
    inputs: {{x: {{shape: [2, 4]}}}}
    target: {target}
"""


def _convert(place: Path, **options: object) -> trtforge.Artifact:
    torch.manual_seed(0)
    return trtforge.convert(torch.nn.Linear(8, 4), torch.randn(2, 8), place, backend="tensorrt-rtx", **options)


def test_options_reach_the_manifest_and_hold_when_it_is_built_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    artifact = _convert(tmp_path / "small", workspace_mib=32, target={"weight_streaming": True, "tiling": "fast"})
    wanted = BuildOptions(workspace_mib=32, weight_streaming=True, tiling="fast")
    assert artifact.build_options == wanted
    again = build_artifact(artifact.path, stages=Stages(ignore_events), output=tmp_path / "again")
    assert again.build_options == wanted
    assert again.facts["engine"]["sha256"] == artifact.facts["engine"]["sha256"]
    plain = _convert(tmp_path / "plain")
    assert plain.facts["engine"]["sha256"] != artifact.facts["engine"]["sha256"]


def test_an_option_that_the_backend_lacks_is_refused_before_the_export(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ConfigError, match="has no version_compatible"):
        _convert(tmp_path / "small", target={"version_compatible": True})
    with pytest.raises(ConfigError, match="no key 'tilling'") as caught:
        _convert(tmp_path / "small", target={"tilling": "fast"})
    assert "tiling" in caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_portable_artifact_keeps_what_was_asked_of_full_tensorrt(tmp_path: Path) -> None:
    if _installed("tensorrt"):
        pytest.skip("the full TensorRT is here")
    torch.manual_seed(0)
    asked = {"version_compatible": True, "hardware_compatibility": "ampere_plus", "timing_cache": "timings.bin"}
    made = trtforge.convert(
        torch.nn.Linear(8, 4), torch.randn(2, 8), tmp_path / "small", backend="tensorrt", target=asked
    )
    assert made.status == "portable"
    assert made.build_options == BuildOptions(
        version_compatible=True, hardware_compatibility="ampere_plus", timing_cache=Path("timings.bin")
    )
    # RTX has none of them: it says so, and builds nothing.
    with pytest.raises(ConfigError, match=r"TensorRT-RTX .* has no hardware_compatibility"):
        build_artifact(made.path, stages=Stages(ignore_events), backend="tensorrt-rtx")
    assert trtforge.open_artifact(made.path).status == "portable"


def _installed(name: str) -> bool:
    from trtforge.runtime.errors import MissingDependencyError
    from trtforge.runtime.trt.backend import find_backend

    try:
        find_backend(name)
    except MissingDependencyError:
        return False
    return True


def test_the_timing_cache_starts_at_the_files_folder(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(YAML.format(target="{timing_cache: caches/t.bin, refit: true, optimization_level: 2}"))
    (config,) = read_config(file)
    assert config.target.options == BuildOptions(
        optimization_level=2, timing_cache=tmp_path / "caches/t.bin", refit=True
    )
    file.write_text(YAML.format(target="{hardware_compatibility: hopper}"))
    with pytest.raises(ConfigError, match="hardware_compatibility"):
        read_config(file)
