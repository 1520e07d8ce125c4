"""The models of one file: which are chosen, which are unchanged, and what became of each; goes on after a failure."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtforge.converter.config import ConversionConfig, read_config
from trtforge.converter.progress import OnEvent, ignore_events
from trtforge.converter.recipe import find_unchanged
from trtforge.runtime.errors import ConfigError, TrtForgeError
from trtforge.runtime.suggest import nearest

__all__ = ["Failure", "Outcome", "convert_all", "convert_changed", "select_models", "skip_unchanged", "worst_exit_code"]

_BUG = 1
_SEVERITY = (0, 2, 3, 4, 5, _BUG)
"""Exit codes from the least to the most serious: a bug of ours says the least about the user's model."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a model failed, as it crosses from a child process: the error's class, message and stage."""

    type: str
    message: str
    stage: str
    exit_code: int

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """An error that was raised in this process; what is none of ours is a bug."""
        code = error.exit_code if isinstance(error, TrtForgeError) else _BUG
        return cls(type(error).__name__, str(error), getattr(error, "stage", ""), code)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model.

    Attributes:
        name: The model's name.
        status: The artifact's status, "unchanged" or "failed".
        path: The artifact's folder, or `NAME.failed` where one was left; None without either.
        seconds: By stage.
        failure: Why it failed; None where it did not.
        error: The exception itself, where it failed in this process.
        facts: The manifest, where there is an artifact.
    """

    name: str
    status: str
    path: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    error: Exception | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, the error's own code, or 1 for a bug."""
        return self.failure.exit_code if self.failure else 0

    def to_json(self) -> dict[str, Any]:
        """The object under `models.NAME` of `convert --json`."""
        data: dict[str, Any] = {
            "status": self.status,
            "artifact": str(self.path) if self.path else None,
            "seconds": self.seconds,
        }
        if self.failure is not None:
            data["error"] = {
                "type": self.failure.type,
                "message": self.failure.message,
                "stage": self.failure.stage,
            }
        return data


def select_models(file: Path, only: str | None) -> tuple[ConversionConfig, ...]:
    """The file's models; with `only` the one of that name, or every variant that a matrix made of it.

    Raises:
        ConfigError: the file is wrong, or no model has that name.
    """
    configs = read_config(file)
    if only is None:
        return configs
    chosen = tuple(c for c in configs if c.name == only) or tuple(c for c in configs if c.model == only)
    if not chosen:
        names = {c.name for c in configs} | {c.model for c in configs}
        raise ConfigError(f"{file} has no model {only!r}", fix=nearest(only, names))
    return chosen


def convert_changed(
    file: Path,
    configs: Sequence[ConversionConfig],
    output: Path,
    *,
    jobs: int = 1,
    force: bool = False,
    on_event: Callable[[str, Any], None],
    on_text: Callable[[str], None],
    on_note: Callable[[str], None],
    on_outcome: Callable[[Outcome], None],
) -> list[Outcome]:
    """Converts the models that changed to `output/NAME`; goes on after a failure.

    One model is converted in this process: a batch's child is exactly that, and the command's watcher outlives its
    crash. Several run in a process each, so that neither a crash, nor memory, nor modules of the same name pass from
    one to the next.

    Args:
        file: Where `configs` come from.
        configs: From `select_models`.
        output: Made where it is missing.
        jobs: How many run at once.
        force: Convert what is unchanged too.
        on_event: Called with a model's name and its progress.
        on_text: Called with what a child wrote to its standard streams, whole lines.
        on_note: Called with sentences for the user.
        on_outcome: Called with each outcome at once, so that a user sees a failure before the rest has run.

    Returns:
        The outcomes in the order of `configs`.
    """
    outcomes: dict[str, Outcome] = {}

    def finish(outcome: Outcome) -> None:
        outcomes[outcome.name] = outcome
        on_outcome(outcome)

    changed = []
    for config in configs:
        skipped = None if force else skip_unchanged(config, output, on_note)
        if skipped is None:
            changed.append(config)
        else:
            finish(skipped)
    if len(configs) == 1:
        name = configs[0].name
        for outcome in convert_all(changed, output, on_event=lambda event: on_event(name, event)):
            finish(outcome)
    else:
        from trtforge.converter.batch_children import Asked, convert_in_children

        asked = [Asked(config.name, output / config.name) for config in changed]
        convert_in_children(
            file, asked, output, jobs=jobs, force=force, on_event=on_event, on_text=on_text, on_outcome=finish
        )
    return [outcomes[config.name] for config in configs]


def skip_unchanged(
    config: ConversionConfig, output: Path, on_note: Callable[[str], None] = lambda text: None
) -> Outcome | None:
    """The outcome "unchanged" where `output/NAME` is what a conversion would make again; else None, with a note why."""
    start = time.perf_counter()
    manifest, reason = find_unchanged(config, output / config.name)
    if manifest is None:
        if reason:
            on_note(f"{config.name}: converted again: {reason}")
        return None
    seconds = {"check": round(time.perf_counter() - start, 3)}
    return Outcome(config.name, "unchanged", output / config.name, seconds, facts=dict(manifest.facts))


def convert_all(
    configs: Sequence[ConversionConfig], output: Path, *, on_event: OnEvent = ignore_events
) -> list[Outcome]:
    """Converts each configuration to `output/NAME` in this process, whether or not it changed.

    Args:
        configs: From `select_models`.
        output: Made where it is missing.
        on_event: Progress.
    """
    return [_convert_one(config, output, on_event) for config in configs]


def worst_exit_code(outcomes: Sequence[Outcome]) -> int:
    """The most serious code of all."""
    return max((outcome.exit_code for outcome in outcomes), key=_SEVERITY.index, default=0)


def _convert_one(config: ConversionConfig, output: Path, on_event: OnEvent) -> Outcome:
    from trtforge.converter.artifact import FAILED_SUFFIX
    from trtforge.converter.pipeline import convert_config
    from trtforge.converter.progress import Stages

    stages = Stages(on_event)
    target = output / config.name
    try:
        artifact = convert_config(config, target, stages)
    except TrtForgeError as error:
        left = target.with_name(target.name + FAILED_SUFFIX)
        kept = left if error.exit_code == 4 and left.is_dir() else None
        return Outcome(config.name, "failed", kept, stages.seconds, Failure.of(error), error)
    except Exception as error:  # noqa: BLE001  # a bug in one model's conversion must not take the others with it
        traceback.print_exc()
        return Outcome(config.name, "failed", None, stages.seconds, Failure.of(error), error)
    return Outcome(config.name, artifact.status, artifact.path, stages.seconds, facts=dict(artifact.facts))
