"""What `trtforge audit` prints."""

from __future__ import annotations

import json
from pathlib import Path

from trtforge.converter.audit import Ask, audit_artifact
from trtforge.converter.progress import Stages
from trtforge.converter.references import call_reference
from trtforge.converter.terminal import ProgressView, print_json, print_table
from trtforge.runtime.errors import ConfigError, ParityError
from trtforge.validation.audit import AuditReport, Trial

__all__ = ["audit"]


def audit(
    path: Path, *, faults: int, rewrites: int, seed: int, loader: str | None, kwargs: str | None, as_json: bool
) -> int:
    """Audits an artifact's proof; the exit code is 0, or `ParityError`'s where the proof lets too much through."""
    data: object | None = None
    if loader is not None:
        named, values = loader, _read_kwargs(kwargs)

        def data() -> object:
            return call_reference(named, values, folder=Path.cwd(), what="loader")

    with ProgressView() as view:
        view.name = path.name
        report = audit_artifact(path, Ask(faults, rewrites, seed, data=data), Stages(view.show))
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)
    return 0 if report.passed else ParityError.exit_code


def _print(report: AuditReport) -> None:
    title = (
        f"{report.name}: proof on {report.golden[1]} rows in {report.golden[0]} samples; "
        f"held out {report.held_out[1]} rows in {report.held_out[0]}; {report.seconds:.0f} s"
    )
    columns = ("planted", "count", "set aside", "refused", "by Polygraphy", "by Polygraphy on its own input")
    kinds = list(dict.fromkeys(trial.kind for trial in report.faults + report.set_aside))
    rows = [_row(kind, [t for t in report.trials if t.fault and t.kind == kind]) for kind in kinds]
    rows.append(_row("faults", [trial for trial in report.trials if trial.fault]))
    rows.append(_row("harmless rewrites", list(report.rewrites)))
    print_table(title, columns, rows)
    for name, trials in (("let through", report.let_through), ("refused wrongly", report.refused_wrongly)):
        if trials:
            told = [[t.kind, t.stage, t.what, t.held_out_reason] for t in trials]
            print_table(name, ("kind", "stage", "what", "on the held-out set"), told)
    share = f"{report.refused_share:.1%} of the faults that exceed the budget were refused"
    verdict = f"{share}, and {len(report.refused_wrongly)} of {len(report.rewrites)} harmless rewrites"
    print_table("", ("verdict",), [[verdict]])


def _row(name: str, trials: list[Trial]) -> list[str]:
    counted = [trial for trial in trials if trial.counts]
    return [
        name,
        str(len(counted)),
        str(len(trials) - len(counted)),
        str(sum(trial.refused for trial in counted)),
        str(sum(bool(trial.polygraphy) for trial in counted)),
        str(sum(bool(trial.polygraphy_own) for trial in counted)),
    ]


def _read_kwargs(text: str | None) -> dict[str, object]:
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--kwargs {text} is not JSON: {error}", fix='write it as \'{"split": "train"}\'') from error
    if not isinstance(values, dict):
        raise ConfigError(f"--kwargs {text} is no JSON object", fix='write it as \'{"split": "train"}\'')
    return values
