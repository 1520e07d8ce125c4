"""Several models of one file, one after the other: goes on after a failure, and remembers what became of each."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtforge.converter.config import ConversionConfig, read_config
from trtforge.converter.progress import OnEvent, ignore_events
from trtforge.runtime.errors import ConfigError, TrtForgeError
from trtforge.runtime.suggest import nearest

__all__ = ["Outcome", "convert_all", "select_models", "worst_exit_code"]

_BUG = 1
_SEVERITY = (0, 2, 3, 4, 5, _BUG)
"""Exit codes from the least to the most serious: a bug of ours says the least about the user's model."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one model.

    Attributes:
        name: The model's name.
        status: The artifact's status, or "failed".
        path: The artifact's folder, or `NAME.failed` where one was left; None without either.
        seconds: By stage.
        error: Why it failed; None where it did not.
        facts: The manifest, where there is an artifact.
    """

    name: str
    status: str
    path: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, the error's own code, or 1 for a bug."""
        if self.error is None:
            return 0
        return self.error.exit_code if isinstance(self.error, TrtForgeError) else _BUG

    def to_json(self) -> dict[str, Any]:
        """The object under `models.NAME` of `convert --json`."""
        data: dict[str, Any] = {
            "status": self.status,
            "artifact": str(self.path) if self.path else None,
            "seconds": self.seconds,
        }
        if self.error is not None:
            kind, stage = type(self.error).__name__, getattr(self.error, "stage", "")
            data["error"] = {"type": kind, "message": str(self.error), "stage": stage}
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


def convert_all(
    configs: Sequence[ConversionConfig],
    output: Path,
    *,
    on_event: OnEvent = ignore_events,
    on_start: Callable[[str], None] = lambda name: None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Converts each configuration to `output/NAME`.

    Args:
        configs: From `select_models`.
        output: Made where it is missing.
        on_event: Progress.
        on_start: Called with each model's name before it starts.
        on_outcome: Called with each outcome at once, so that a user sees a failure before the rest has run.
    """
    outcomes = []
    for config in configs:
        on_start(config.name)
        outcome = _convert_one(config, output, on_event)
        on_outcome(outcome)
        outcomes.append(outcome)
    return outcomes


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
        return Outcome(config.name, "failed", kept, stages.seconds, error)
    except Exception as error:  # noqa: BLE001  # a bug in one model's conversion must not take the others with it
        traceback.print_exc()
        return Outcome(config.name, "failed", None, stages.seconds, error)
    return Outcome(config.name, artifact.status, artifact.path, stages.seconds, facts=dict(artifact.facts))
