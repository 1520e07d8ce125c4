"""The pytest plugin: `@pytest.mark.engine("configs/x.yaml", model="resnet18")` makes a test of an engine's proof.

pytest imports this at every start, in repositories that never convert anything: it loads the standard library alone,
and the rest of trtforge when a marked test is collected.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from trtforge.converter.engine_case import EngineCase, EngineSession

__all__ = ["engine_case"]

_MARK = "engine"
_SESSION: pytest.StashKey[EngineSession] = pytest.StashKey()
_CASE: pytest.StashKey[EngineCase] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Two options and their ini forms."""
    group = parser.getgroup("trtforge", "TensorRT engines (trtforge)")
    group.addoption(
        "--engine-baseline",
        choices=("check", "update"),
        default="check",
        help="check: compare with the baseline file; update: write what was measured into it.",
    )
    group.addoption(
        "--engine-proof",
        choices=("engine", "onnxruntime"),
        default=None,
        help="engine: run engines on the GPU, and skip where there is none; onnxruntime: prove the ONNX there.",
    )
    parser.addini("engine_proof", "default of --engine-proof", default="engine")
    parser.addini("engine_baseline_file", "the baseline, relative to the rootdir", default="engine-baseline.json")


def pytest_configure(config: pytest.Config) -> None:
    """Names the mark."""
    config.addinivalue_line(
        "markers",
        "engine(config, model=None, allowed=None, changes='fail'): convert a model of a trtforge YAML file, prove it, "
        "and compare it with the baseline; `allowed` takes sqnr_drop_db and growth, changes='allow' passes new weights "
        "or a new graph whose figures are not worse.",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A file of several models, or a matrix, is one test a model."""
    mark = metafunc.definition.get_closest_marker(_MARK)
    if mark is None:
        return
    from trtforge.converter.engine_case import model_names

    names = model_names(mark, metafunc.config, metafunc.definition.path)
    if len(names) > 1:
        if "engine_case" not in metafunc.fixturenames:
            metafunc.fixturenames.append("engine_case")
        metafunc.parametrize("engine_case", names, indirect=True)


@pytest.fixture
def engine_case(request: pytest.FixtureRequest) -> EngineCase:
    """The converted model of a test marked `engine`: `artifact`, `comparison`, `run(feeds)`."""
    return _case_of(request.node)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """Skips with a reason before any fixture is made."""
    if item.get_closest_marker(_MARK) is not None:
        _case_of(item).skip_unless_possible()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Checks the engine before the test's own body; a failure here is the test's failure."""
    if item.get_closest_marker(_MARK) is not None:
        _case_of(item).check()
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says what an update wrote, and what changed without getting worse."""
    session = config.stash.get(_SESSION, None)
    if session is None:
        return
    lines = session.summary()
    if lines:
        terminalreporter.section("engines")
        for line in lines:
            terminalreporter.line(line)


def _case_of(item: pytest.Item) -> EngineCase:
    if _CASE in item.stash:
        return item.stash[_CASE]
    from trtforge.converter.engine_case import EngineSession, make_case

    mark = item.get_closest_marker(_MARK)
    if mark is None:
        pytest.fail("engine_case needs @pytest.mark.engine('configs/x.yaml', model='name') on the test", pytrace=False)
    if _SESSION not in item.config.stash:
        item.config.stash[_SESSION] = EngineSession.from_config(item.config)
    name = getattr(item, "callspec", None) and item.callspec.params.get("engine_case")  # type: ignore[attr-defined]
    case = make_case(mark, item.config.stash[_SESSION], item.path, name)
    item.stash[_CASE] = case
    return case
