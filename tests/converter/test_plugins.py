"""Plugin libraries: refused by a backend without plugins, recorded by name and hash, loaded only where they are named.

No TensorRT with plugins is installed where these run: its registry has a stand-in, and no engine is built with one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trtforge
from trtforge.converter.config import read_config
from trtforge.converter.progress import Stages, ignore_events
from trtforge.converter.rebuild import build_artifact
from trtforge.runtime.errors import ArtifactError, BuildError, ConfigError, MissingDependencyError
from trtforge.runtime.trt import plugins
from trtforge.runtime.trt.backend import find_backend
from trtforge.runtime.trt.plugins import PluginLibrary, load_plugins, match_plugins


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "libown.so"
    path.write_bytes(b"\x7fELF, as far as its hash goes")
    return path


def convert(place: Path, backend: str, *libraries: Path) -> trtforge.Artifact:
    torch.manual_seed(0)
    target = {"plugins": [str(path) for path in libraries]}
    return trtforge.convert(torch.nn.Linear(8, 4), torch.randn(2, 8), place, backend=backend, target=target)


def test_a_backend_without_plugins_says_so_before_the_export(tmp_path: Path, library: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(ConfigError, match=r"TensorRT-RTX .* has no plugins") as caught:
        convert(tmp_path / "net", "tensorrt-rtx", library)
    assert "no registry" in caught.value.why
    assert "custom_ops" in caught.value.fix
    assert not (tmp_path / "net").exists()


def test_a_portable_artifact_names_its_libraries_and_brings_none(tmp_path: Path, library: Path) -> None:
    try:
        find_backend("tensorrt")
    except MissingDependencyError:
        pass
    else:
        pytest.skip("the full TensorRT is here")
    with pytest.raises(ConfigError, match=r"there is no file .*libabsent\.so"):
        convert(tmp_path / "net", "tensorrt", tmp_path / "libabsent.so")
    artifact = convert(tmp_path / "net", "tensorrt", library)
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    assert artifact.plugin_libraries == (PluginLibrary("libown.so", digest),)
    assert artifact.build_options.plugins == ()
    assert str(tmp_path) not in str(artifact.facts["target"])
    assert "libown.so" not in artifact.manifest.files
    stages = Stages(ignore_events)
    with pytest.raises(ArtifactError, match=r"needs the plugin libraries libown\.so, none are given"):
        build_artifact(artifact.path, stages=stages, backend="tensorrt-rtx")
    with pytest.raises(ConfigError, match="has no plugins"):
        build_artifact(artifact.path, stages=stages, backend="tensorrt-rtx", plugins=[library])
    assert trtforge.open_artifact(artifact.path).status == "portable"


def test_paths_in_yaml_start_at_its_folder(tmp_path: Path, library: Path) -> None:
    text = "version: 1\nmodels:\n  net:\n    source: {onnx: net.onnx}\n    target: {plugins: [libown.so]}\n"
    (tmp_path / "net.yaml").write_text(text)
    (config,) = read_config(tmp_path / "net.yaml")
    assert config.target.options.plugins == (library,)


def test_only_the_libraries_it_was_proved_with(tmp_path: Path, library: Path) -> None:
    engine, needed = tmp_path / "model.engine", PluginLibrary.of_file(library)
    assert match_plugins([needed], [library], engine) == (library,)
    assert match_plugins([], [], engine) == ()
    with pytest.raises(ArtifactError, match=r"needs the plugin library libown\.so") as caught:
        match_plugins([needed], [], engine)
    assert "--plugin" in caught.value.fix
    other = tmp_path / "libother.so"
    other.write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"needs no plugin library libother\.so"):
        match_plugins([needed], [library, other], engine)
    library.write_bytes(b"another build")
    with pytest.raises(ArtifactError, match=r"is not the plugin library that .* was proved with"):
        match_plugins([needed], [library], engine)


def test_each_is_registered_once_in_order(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_LOADED", {})
    said: list[Any] = []
    broken = tmp_path / "libbroken.so"

    def load_library(path: str) -> object | None:
        said.append(Path(path).name)
        return None if path == str(broken) else object()

    trt: Any = SimpleNamespace(
        init_libnvinfer_plugins=lambda logger, namespace: said.append(namespace),
        get_plugin_registry=lambda: SimpleNamespace(load_library=load_library),
    )
    load_plugins(trt, None, [])
    assert said == []
    second = tmp_path / "libsecond.so"
    second.write_bytes(b"second")
    load_plugins(trt, None, [library, second])
    load_plugins(trt, None, [second])
    assert said == ["", "libown.so", "libsecond.so", ""]
    for _ in range(2):  # missing, then refused
        with pytest.raises(BuildError, match=r"libbroken\.so does not load"):
            load_plugins(trt, None, [broken])
        broken.write_bytes(b"broken")


def test_a_library_that_changed_since_is_not_taken_for_the_one_that_is_loaded(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_LOADED", {})
    registry = SimpleNamespace(load_library=lambda path: object())
    trt: Any = SimpleNamespace(init_libnvinfer_plugins=lambda *_: True, get_plugin_registry=lambda: registry)
    load_plugins(trt, None, [library])
    library.write_bytes(b"another")
    with pytest.raises(BuildError, match=r"libown\.so changed after this process loaded it"):
        load_plugins(trt, None, [library])
