"""Caches of transformers models: what they hold is named, and goes in and out of an engine."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import trtforge
from trtforge.converter.caches import make_cache
from trtforge.converter.signature import bind_call, name_outputs
from trtforge.runtime.errors import ExportError

transformers = pytest.importorskip("transformers")

LAYERS = [(torch.full((2, 2, 5, 16), float(i)), torch.full((2, 2, 5, 16), i + 0.5)) for i in range(2)]
LATER = "cache" in inspect.signature(transformers.GPT2LMHeadModel.forward).parameters
PAST = "cache" if LATER else "past_key_values"
NAMES = [f"{PAST}.{part}_cache.{layer}" for part in ("key", "value") for layer in (0, 1)]


class Step(torch.nn.Module):
    def forward(self, past_key_values: Any) -> Any:
        return past_key_values


def test_a_cache_is_the_tensors_in_it() -> None:
    cache = transformers.DynamicCache(LAYERS)
    assert [name.replace("past_key_values", PAST) for name in bind_call(Step(), [cache], {})] == NAMES
    both = transformers.EncoderDecoderCache(cache, transformers.DynamicCache(LAYERS))
    names = [name for name, _ in name_outputs({"past_key_values": both})]
    assert names[0] == "past_key_values.self_attention_cache.key_cache.0"
    assert names[-1] == "past_key_values.cross_attention_cache.value_cache.1"
    assert len(names) == 8


def test_caches_from_their_tensors() -> None:
    halves = {"key_cache": tuple(k for k, _ in LAYERS), "value_cache": tuple(v for _, v in LAYERS)}
    made = make_cache(halves)
    assert [float(tensor.mean()) for _, tensor in name_outputs({"past": made})] == [0, 1, 0.5, 1.5]
    both = make_cache({"self_attention_cache": halves, "cross_attention_cache": halves})
    assert len(name_outputs({"past": both})) == 8
    other = {"key_cache": (), "more": ()}
    assert make_cache(other) is other


def test_a_cache_of_fixed_size_is_explained() -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ExportError, match="StaticCache") as caught:
        name_outputs({"past": transformers.StaticCache(config, max_cache_len=4)})
    assert "use_cache=False" in caught.value.fix


def gpt2() -> torch.nn.Module:
    settings = transformers.GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    model: torch.nn.Module = transformers.GPT2LMHeadModel(settings)
    return model


@pytest.mark.slow  # ten seconds each: transformers takes long to trace
def test_a_step_with_a_past_of_any_length(tmp_path: Path) -> None:
    ids, mask = torch.randint(0, 99, (2, 1)), torch.ones(2, 6, dtype=torch.int64)
    artifact = trtforge.convert(
        gpt2(),
        {"input_ids": ids, "attention_mask": mask, PAST: transformers.DynamicCache(LAYERS)},
        tmp_path / "step",
        dims={"batch": (1, 2, 4), "past": (1, 5, 31), "all": (2, 6, 32)},
        inputs={"input_ids": ("batch", 1), "attention_mask": ("batch", "all")}
        | dict.fromkeys(NAMES, ("batch", 2, "past", 16)),
    )
    check(artifact, "past + 1")


@pytest.mark.slow
def test_a_step_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_gpt2.py").write_text(
        "import transformers\n"
        "def make():\n"
        "    settings = transformers.GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=2)\n"
        "    return transformers.GPT2LMHeadModel(settings)\n"
    )
    past = {name: {"dtype": "float32", "shape": ["batch", 2, "past", 16]} for name in NAMES}
    ids = {"dtype": "int64", "shape": ["batch", 1], "values": [0, 98]}
    model = {
        "source": {"factory": "my_gpt2:make"},
        "dims": {"batch": [1, 2, 4], "past": [1, 5, 31]},
        "inputs": {"input_ids": ids, **past},
    }
    (tmp_path / "gpt2.yaml").write_text(json.dumps({"version": 1, "models": {"step": model}}))
    from trtforge.converter.cli import main

    monkeypatch.setattr("sys.argv", ["trtforge", "convert", str(tmp_path / "gpt2.yaml"), "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    check(trtforge.converter.artifact.open_artifact(tmp_path / "step"), "past + 1")


def check(artifact: Any, length: str) -> None:
    assert artifact.status in ("portable", "built", "validated")
    logits, *caches = artifact.facts["outputs"]
    assert logits["name"] == "logits"
    # An output that would have an input's name says that it is one.
    assert [item["name"] for item in caches] == [name + "_output" * LATER for name in NAMES]
    assert [item["shape"] for item in caches] == [["batch", 2, length, 16]] * 4
