"""The environment variable that decides TF32 on TensorRT-RTX is held while an engine lives, and given back."""

from __future__ import annotations

import os

import pytest

from trtforge.runtime.trt.tf32 import MatchingTf32, set_build_tf32

VARIABLE = "NVIDIA_TF32_OVERRIDE"


def engine_built_under(value: str | None):
    """A context is given under the right value of the variable alone, as RTX 1.6 does."""
    return lambda: "context" if os.environ.get(VARIABLE) == value else None


@pytest.fixture(autouse=True, params=[None, "0", "1"])
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, request.param)
    yield request.param
    assert os.environ.get(VARIABLE) == request.param


@pytest.mark.parametrize("value", ["0", None])
def test_value_is_found_held_and_given_back(value: str | None) -> None:
    first, second, retries = MatchingTf32(), MatchingTf32(), []
    assert first(engine_built_under(value), lambda: retries.append(1)) == "context"
    assert second(engine_built_under(value), lambda: retries.append(2)) == "context"
    assert os.environ.get(VARIABLE) == value
    assert retries == ([1] if value is None else [])
    first.release()
    first.release()
    assert os.environ.get(VARIABLE) == value
    second.release()


def test_engines_of_both_kinds_do_not_live_together() -> None:
    first, second = MatchingTf32(), MatchingTf32()
    assert first(engine_built_under("0"), lambda: None) == "context"
    assert second(engine_built_under(None), lambda: None) is None
    assert first(engine_built_under("0"), lambda: None) == "context"
    first.release()
    assert second(engine_built_under(None), lambda: None) == "context"
    second.release()


def test_refusal_leaves_the_environment_alone() -> None:
    assert MatchingTf32()(lambda: None, lambda: None) is None


def test_builds_set_it(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    set_build_tf32(False)
    assert os.environ[VARIABLE] == "0"
    set_build_tf32(True)
    assert VARIABLE not in os.environ
    if before is not None:
        os.environ[VARIABLE] = before
