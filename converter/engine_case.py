"""One engine under test: converted once a session, compared with the baseline, explained where it got worse."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from trtforge.converter.artifact import FAILED_SUFFIX, Artifact, open_artifact
from trtforge.converter.baseline import read_baseline, write_baseline
from trtforge.converter.batch import select_models
from trtforge.converter.compare_artifacts import Allowance, Comparison, compare_records, format_rows
from trtforge.converter.record import ArtifactRecord, record_artifact
from trtforge.runtime.errors import ConfigError, MissingDependencyError, ParityError, TrtForgeError

if TYPE_CHECKING:
    from trtforge.runtime.runner import Array, Tensors

__all__ = ["EngineCase", "EngineSession", "make_case", "model_names"]

_UPDATE = "pytest --engine-baseline=update"


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a conversion: the artifact (`NAME.failed` where its proof failed), and the error."""

    artifact: Artifact | None
    error: TrtForgeError | None


@dataclass(slots=True)
class EngineSession:
    """What the tests of one pytest run share.

    Attributes:
        root: pytest's rootdir: configurations and the baseline are looked up from here.
        baseline: The baseline file.
        update: Whether it is rewritten.
        proof: "engine" or "onnxruntime".
        folder: Where artifacts go.
    """

    root: Path
    baseline: Path
    update: bool
    proof: str
    folder: Path
    written: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _outcomes: dict[tuple[Path, str], _Outcome] = field(default_factory=dict)
    _temporary: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def from_config(cls, config: pytest.Config) -> EngineSession:
        """Options before ini values. Artifacts go into pytest's cache, or a temporary folder where it is off."""
        proof = config.getoption("--engine-proof") or config.getini("engine_proof")
        if proof not in ("engine", "onnxruntime"):
            raise pytest.UsageError(f"ini option engine_proof is {proof!r}, not engine or onnxruntime")
        cache = getattr(config, "cache", None)
        temporary = None if cache else tempfile.TemporaryDirectory(prefix="trtforge-")
        folder = cache.mkdir("trtforge") if cache else Path(temporary.name)  # type: ignore[union-attr]
        return cls(
            root=config.rootpath,
            baseline=config.rootpath / config.getini("engine_baseline_file"),
            update=config.getoption("--engine-baseline") == "update",
            proof=proof,
            folder=folder,
            _temporary=temporary,
        )

    def convert(self, file: Path, name: str) -> _Outcome:
        """Converts a model once; the outcome, an error too, is remembered."""
        key = file.resolve(), name
        if key not in self._outcomes:
            self._outcomes[key] = self._convert(file, name)
        return self._outcomes[key]

    def summary(self) -> list[str]:
        """Lines for the end of the run."""
        lines = list(self.notes)
        if self.update:
            count = len(self.written)
            what = f"{count} {'entry' if count == 1 else 'entries'} of {self.baseline.name} changed"
            lines.append(f"{what}: {', '.join(self.written)}" if count else f"{self.baseline.name} is as it was")
        return lines

    def _convert(self, file: Path, name: str) -> _Outcome:
        from trtforge.converter.pipeline import convert_config
        from trtforge.converter.progress import Stages

        # Models of two files may have one name.
        target = self.folder / hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8] / name
        left = target.with_name(target.name + FAILED_SUFFIX)
        try:
            (config,) = select_models(file, name)
            # The user's `filterwarnings = error` is for the user's code, not for torch's exporter.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _Outcome(convert_config(config, target, Stages()), None)
        except ParityError as error:
            return _Outcome(open_artifact(left) if left.is_dir() else None, error)
        except TrtForgeError as error:
            return _Outcome(None, error)


@dataclass(slots=True)
class EngineCase:
    """One engine under test.

    Attributes:
        key: Its entry in the baseline: "configs/x.yaml::name".
        file: The configuration.
        name: The model's name in it, with the matrix's values.
        session: What it shares.
        allowance: What counts as noise.
        strict: Whether other weights, another graph, plan, data or tolerance fail although no figure is worse.
    """

    key: str
    file: Path
    name: str
    session: EngineSession
    allowance: Allowance
    strict: bool
    _comparison: Comparison | None = None
    _record: ArtifactRecord | None = None

    @property
    def artifact(self) -> Artifact:
        """The converted model; the conversion runs at the first call of the session. Fails the test on an error."""
        outcome = self.session.convert(self.file, self.name)
        if outcome.artifact is None or outcome.error is not None:
            pytest.fail(f"{self.key}\n{outcome.error}", pytrace=False)
        return outcome.artifact

    @property
    def comparison(self) -> Comparison | None:
        """Against the baseline's entry; None where there is none yet."""
        known = read_baseline(self.session.baseline).get(self.key)
        if self._comparison is None and known is not None:
            self._comparison = compare_records(known, self.record(), self.allowance)
        return self._comparison

    def run(self, feeds: Tensors) -> dict[str, Array]:
        """Outputs for inputs by name: of the engine where it ran here, else of the ONNX on onnxruntime."""
        artifact = self.artifact
        if artifact.status == "validated" and artifact.engine is not None:
            from trtforge.runtime.trt.execute import EngineRunner

            facts, compatible = artifact.facts["engine"], artifact.build_options.version_compatible
            runner = EngineRunner(artifact.engine, facts["backend"], tf32=facts["tf32"], version_compatible=compatible)
            with contextlib.closing(runner):
                return runner.run(feeds)
        from trtforge.runtime.onnx_runner import OnnxRuntimeRunner

        return OnnxRuntimeRunner(artifact.model, disable_quant_qdq=True).run(feeds)

    def record(self) -> ArtifactRecord:
        """What the baseline would say of it now."""
        if self._record is None:
            outcome = self.session.convert(self.file, self.name)
            self._record = record_artifact(outcome.artifact or self.artifact)
        return self._record

    def skip_unless_possible(self) -> None:
        """Skips the test where its engine cannot run here, and the ONNX was not asked for."""
        if self.session.proof == "onnxruntime":
            return
        from trtforge.runtime.device import device_facts

        device = device_facts()
        if device is None:
            pytest.skip(f"{self.key}: no GPU here to run the engine; --engine-proof=onnxruntime proves the ONNX alone")
        reason = _why_not_runnable(self.file, self.name, device.compute_capability)
        if reason:
            pytest.skip(f"{self.key}: {reason}")

    def check(self) -> None:
        """Converts, proves, and compares with the baseline or rewrites its entry; fails the test with a table."""
        __tracebackhide__ = True
        try:
            problem = self._check()
        except TrtForgeError as error:
            problem = str(error)
        if problem:
            pytest.fail(f"{self.key}: {problem}", pytrace=False)

    def _check(self) -> str:
        read_baseline(self.session.baseline)  # a broken one is told before minutes of conversion
        outcome = self.session.convert(self.file, self.name)
        if outcome.artifact is None:
            return f"the conversion failed\n{outcome.error}"
        if self.session.update:
            if outcome.error is not None:
                return f"a failed proof is no baseline\n{outcome.error}"
            self.session.written += write_baseline(self.session.baseline, {self.key: self.record()})
            return ""
        comparison = self.comparison
        if comparison is None:
            failed = f"\n{outcome.error}" if outcome.error is not None else ""
            return f"{self.session.baseline.name} has no entry for it; run `{_UPDATE}` and commit the file{failed}"
        if comparison.regressions or outcome.error is not None:
            return self._explain(comparison, outcome)
        if self.strict and comparison.pinned_changes:
            changes = "\n".join(f"  {change.text}" for change in comparison.pinned_changes)
            return (
                f"it is another engine than the baseline's; its figures are within what is allowed\n{changes}\n"
                + "\n".join(f"  {line}" for line in format_rows(comparison.rows))
                + f"\nto accept: {_UPDATE}, and review the diff; changes='allow' in the mark passes such changes"
            )
        self.session.notes += [f"{self.key}: {change.text}; no worse" for change in comparison.changes]
        return ""

    def _explain(self, comparison: Comparison, outcome: _Outcome) -> str:
        lines = [f"regression against {self.session.baseline.name}"]
        lines += [f"  {line}" for line in format_rows(comparison.rows)]
        causes = comparison.causes
        if causes:
            lines.append(f"likely cause: {causes[0].text}")
            lines += [f"  also: {cause.text}" for cause in causes[1:]]
        lines += [f"  beside it: {change.text}" for change in comparison.changes if change not in causes]
        if outcome.error is not None:
            lines.append(str(outcome.error))
        else:
            lines.append(f"to accept: {_UPDATE}, and review the diff")
        if outcome.artifact is not None:
            lines.append(f"the artifact is {outcome.artifact.path}; its report.html shows every figure")
        return "\n".join(lines)


def make_case(mark: pytest.Mark, session: EngineSession, test: Path, name: str | None) -> EngineCase:
    """The case of a marked test.

    Args:
        mark: The mark.
        session: What the run's tests share.
        test: The test's file.
        name: The model, where the test is one of several; None: what the mark says.
    """
    file, model, options = _read_mark(mark, session.root, test)
    name = name or _names(file, model)[0]
    key = file.relative_to(session.root).as_posix() if file.is_relative_to(session.root) else file.as_posix()
    allowed = options.get("allowed") or {}
    try:
        allowance = Allowance(**allowed)
    except TypeError:
        pytest.fail(f"mark engine: allowed={allowed!r}; it takes sqnr_drop_db, ceiling_db and growth", pytrace=False)
    strict = options.get("changes", "fail") != "allow"
    return EngineCase(f"{key}::{name}", file, name, session, allowance, strict)


def model_names(mark: pytest.Mark, config: pytest.Config, test: Path) -> tuple[str, ...]:
    """The models that a mark means: one, or all of a file or a matrix."""
    try:
        file, model, _ = _read_mark(mark, config.rootpath, test)
        return _names(file, model)
    except TrtForgeError as error:
        raise pytest.Collector.CollectError(f"mark engine of a test in {test.name}: {error}") from None


def _names(file: Path, model: str | None) -> tuple[str, ...]:
    return tuple(config.name for config in select_models(file, model))


def _read_mark(mark: pytest.Mark, root: Path, test: Path) -> tuple[Path, str | None, Mapping[str, Any]]:
    unknown = sorted(set(mark.kwargs) - {"config", "model", "allowed", "changes"})
    given = mark.args[0] if mark.args else mark.kwargs.get("config")
    if not isinstance(given, str | Path) or len(mark.args) > 1 or unknown:
        called = ", ".join([*map(repr, mark.args), *(f"{k}={v!r}" for k, v in mark.kwargs.items())])
        raise ConfigError(
            f"@pytest.mark.engine({called})", fix="write @pytest.mark.engine('configs/x.yaml', model='name')"
        )
    places = [root / given, test.parent / given]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ConfigError(f"there is no {given}", why=f"looked for {' and '.join(map(str, dict.fromkeys(places)))}")
    return file, mark.kwargs.get("model"), mark.kwargs


def _why_not_runnable(file: Path, name: str, compute_capability: str) -> str:
    from trtforge.runtime.trt.backend import find_backend

    (config,) = select_models(file, name)
    try:
        backend = find_backend(config.target.backend)
    except MissingDependencyError as error:
        return f"{error.what}; {error.fix}"
    if not backend.capabilities.runs_on(compute_capability):
        return f"{backend} does not run on this GPU (compute capability {compute_capability})"
    return ""
