"""Factories and checkpoints: what is loaded, and what is said where it cannot be."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from trtforge.converter.config import ConversionConfig, Source
from trtforge.converter.references import UserCodeError, call_reference
from trtforge.converter.sources import LoadedModel, load_source, module_hash
from trtforge.runtime.errors import ConfigError

FACTORY = """
import torch
def net(width=4):
    return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 2))
def noisy():
    return torch.nn.Linear(3, 3)
def broken():
    raise RuntimeError("no such luck")
"""


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    (tmp_path / "source_models.py").write_text(FACTORY)
    sys.modules.pop("source_models", None)
    return tmp_path


def load(folder: Path, **source: Any) -> LoadedModel:
    chosen = Source(**{"factory": "source_models:net", **source})
    return load_source(ConversionConfig("m", source=chosen, folder=folder))


def good_state(width: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 2)).state_dict()


def write(path: Path, state: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if "nested" in path.name else state, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "nested.pt"])
def test_checkpoint_is_loaded(folder: Path, name: str) -> None:
    state = good_state()
    loaded = load(folder, checkpoint=write(folder / name, state))
    assert loaded.module is not None
    assert not loaded.module.training
    assert all(torch.equal(value, state[key]) for key, value in loaded.module.state_dict().items())


def test_random_weights_are_the_same_every_time_and_leave_the_caller_s_generator_alone(folder: Path) -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first, second = (load(folder, factory="source_models:noisy") for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert first.checkpoint_hash == second.checkpoint_hash
    assert first.module is not None
    with torch.no_grad():
        next(iter(first.module.parameters())).add_(1)
    assert module_hash(first.module) != first.checkpoint_hash


def test_checkpoint_that_does_not_fit_lists_its_keys(folder: Path) -> None:
    state = good_state(width=5)
    state["extra"] = state.pop("1.bias")
    with pytest.raises(ConfigError) as caught:
        load(folder, checkpoint=write(folder / "w.pt", state))
    said = str(caught.value)
    for part in ("1 missing keys (1.bias)", "1 unexpected keys (extra)", "0.weight: model (4, 3), checkpoint (5, 3)"):
        assert part in said


def test_prefix_of_a_wrapped_module_is_recognised(folder: Path) -> None:
    state = {f"module.{key}": value for key, value in good_state().items()}
    with pytest.raises(ConfigError, match=r"begin with 'module\.'"):
        load(folder, checkpoint=write(folder / "w.pt", state))


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickle_that_would_run_code_is_refused(folder: Path, how: str) -> None:
    marker, path = folder / "ran", folder / "evil.pt"
    if how == "torch":
        torch.save({"w": Evil(marker)}, path)
    else:
        path.write_bytes(pickle.dumps({"w": Evil(marker)}))
    with pytest.raises(ConfigError, match=r"evil\.pt"):
        load(folder, checkpoint=path)
    assert not marker.exists()


@pytest.mark.parametrize(("name", "data"), [("w.pt", b"garbage"), ("w.pt", b""), ("w.safetensors", b"garbage")])
def test_garbage_is_refused(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(ConfigError, match=name):
        load(folder, checkpoint=folder / name)


def test_missing_checkpoint_names_the_nearest_file(folder: Path) -> None:
    write(folder / "weights_final.pt", good_state())
    with pytest.raises(ConfigError, match=r"did you mean 'weights_final\.pt'"):
        load(folder, checkpoint=folder / "weights_finl.pt")


def test_non_finite_weights_are_named(folder: Path) -> None:
    state = good_state()
    state["1.weight"][0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"1 weights hold NaN or Inf: 1\.weight"):
        load(folder, checkpoint=write(folder / "w.pt", state))


@pytest.mark.parametrize(("call", "precision"), [("half", "fp16"), ("bfloat16", "bf16")])
def test_half_weights_are_refused_with_the_way_to_half_precision(folder: Path, call: str, precision: str) -> None:
    (folder / "source_models.py").write_text(f"{FACTORY}\ndef low():\n    return net().{call}()\n")
    with pytest.raises(ConfigError, match=r"4 of 4 weights are b?float16: 0\.weight") as told:
        load(folder, factory="source_models:low")
    assert f"`precision: {precision}`" in str(told.value)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_checkpoint_in_half_precision_is_taken_in_the_modules_own(folder: Path, name: str) -> None:
    state = {key: tensor.half() for key, tensor in good_state().items()}
    loaded = load(folder, checkpoint=write(folder / name, state))
    assert loaded.module is not None
    for key, tensor in loaded.module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[key].float())


@pytest.mark.parametrize(
    ("reference", "kwargs", "said"),
    [
        ("source_modles:net", {}, "did you mean 'source_models'"),
        ("source_models:nett", {}, "did you mean 'net'"),
        ("source_models:net", {"widht": 3}, "widht"),
        ("source_models:torch", {}, "cannot be called|can be called"),
    ],
)
def test_wrong_reference(folder: Path, reference: str, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        call_reference(reference, kwargs, folder=folder, what="factory")


def test_user_s_exception_is_the_cause(folder: Path) -> None:
    with pytest.raises(UserCodeError, match="no such luck") as caught:
        call_reference("source_models:broken", {}, folder=folder, what="factory")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert str(folder) not in sys.path
