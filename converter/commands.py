"""What each command does and prints; `cli.py` has only their names and options, so that `--help` stays fast."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtforge.converter.batch import Outcome, convert_changed, select_models, worst_exit_code
from trtforge.converter.batch_link import open_link
from trtforge.converter.progress import Event
from trtforge.converter.terminal import (
    ProgressView,
    only_results_on_stdout,
    print_error,
    print_json,
    print_table,
    print_text,
)
from trtforge.runtime.errors import ConfigError, TrtForgeError
from trtforge.runtime.watch import note

__all__ = ["bisect", "calibrate", "convert", "export_triton", "inspect", "print_outcomes", "report", "validate"]


def convert(file: Path, *, only: str | None, output: Path, jobs: int, force: bool, as_json: bool) -> int:
    """Converts the models of `file` that changed; the exit code is the worst of theirs."""
    link = open_link()
    configs = select_models(file, only)
    if len(configs) == 1:
        note(name=configs[0].name, as_json=as_json)
    with only_results_on_stdout(), ProgressView() as view:

        def show(name: str, event: Event) -> None:
            if link is not None:
                link.show(event)
            else:
                view.show(event, name)

        def tell(outcome: Outcome) -> None:
            if isinstance(outcome.error, TrtForgeError):
                print_error(outcome.error, subject=outcome.name)
            elif outcome.failure is not None and outcome.error is None and outcome.failure.type == "ChildCrashError":
                view.say(f"error in {outcome.name} [{outcome.failure.stage}]: {outcome.failure.message}")

        outcomes = convert_changed(
            file,
            configs,
            output,
            jobs=jobs,
            force=force,
            on_event=show,
            on_text=lambda text: view.say(text.rstrip("\n")),
            on_note=view.say,
            on_outcome=tell,
        )
    if len(outcomes) > 1 and any(outcome.status not in ("failed", "unchanged") for outcome in outcomes):
        from trtforge.converter.report_files import update_index

        try:
            update_index(output)
        except TrtForgeError as error:  # a page about artifacts decides nothing about them
            print_error(error)
    print_outcomes(outcomes, as_json=as_json)
    return worst_exit_code(outcomes)


def print_outcomes(outcomes: Sequence[Outcome], *, as_json: bool) -> None:
    """The result of a conversion on stdout."""
    if as_json:
        print_json({"models": {outcome.name: outcome.to_json() for outcome in outcomes}})
    else:
        print_table("", _COLUMNS, [_row(outcome) for outcome in outcomes])


def validate(path: Path, *, output: Path | None, plugins: Sequence[Path], as_json: bool) -> int:
    """Checks and proves an artifact again."""
    from trtforge.converter.progress import Stages
    from trtforge.converter.revalidate import validate_artifact

    with ProgressView() as view:
        view.name = path.name
        stages = Stages(view.show)
        artifact = validate_artifact(path, output=output, plugins=plugins, stages=stages)
    facts = dict(artifact.facts)
    outcome = Outcome(artifact.name, artifact.status, artifact.path, stages.seconds, facts=facts)
    print_outcomes([outcome], as_json=as_json)
    return 0


def build(path: Path, *, output: Path | None, backend: str | None, plugins: Sequence[Path], as_json: bool) -> int:
    """Builds an artifact's engine on this machine."""
    from trtforge.converter.progress import Stages
    from trtforge.converter.rebuild import build_artifact

    with ProgressView() as view:
        view.name = path.name
        stages = Stages(view.show)
        artifact = build_artifact(path, output=output, backend=backend, plugins=plugins, stages=stages)
    outcome = Outcome(artifact.name, artifact.status, artifact.path, stages.seconds, facts=dict(artifact.facts))
    print_outcomes([outcome], as_json=as_json)
    return 0


def inspect(path: Path, *, as_json: bool) -> int:
    """Prints what an artifact or an ONNX file holds."""
    from trtforge.converter.inspection import describe_path

    facts = describe_path(path)
    if as_json:
        print_json(facts)
        return 0
    for title, columns, rows in _inspection_tables(facts):
        print_table(title, columns, rows)
    return 0


def export_triton(
    path: Path, repository: Path, *, name: str | None, onnx: bool, allow_unvalidated: bool, as_json: bool
) -> int:
    """Writes an artifact into a Triton model repository."""
    from trtforge.converter import export_triton as triton
    from trtforge.converter.progress import Stages

    with ProgressView() as view:
        view.name = path.name
        found = triton.export_triton(
            path, repository, stages=Stages(view.show), name=name, onnx=onnx, allow_unvalidated=allow_unvalidated
        )
    if as_json:
        print_json(found.to_json())
    else:
        print_text(f"{found.path}: version {found.version}{'' if found.added else ', there already'}")
        if found.note:
            print_text(f"  {found.note}")
    return 0


def report(path: Path, *, as_json: bool) -> int:
    """Draws pages again from the data beside them."""
    from trtforge.converter.report_files import INDEX, report_folder

    found = report_folder(path)
    index = path / INDEX if (path / INDEX).exists() else None
    if as_json:
        print_json({"reports": [item.to_json() for item in found], "index": index and str(index)})
        return 0
    for item in found:
        facts = item.to_json()
        print_text(f"{facts['name']}: {facts['verdict']}, {facts['status']}. {facts['summary']}")
        print_text(f"  {facts['page']}{' (drawn anew)' if item.rewritten else ''}")
    if index is not None:
        print_text(str(index))
    return 0


def bisect(path: Path, *, on: str, plan: Path | None, as_json: bool) -> int:
    """Finds the layers to blame; `plan` is where the mended plan goes."""
    from trtforge.converter.bisect import bisect_on
    from trtforge.converter.blame_text import describe_finding
    from trtforge.converter.progress import Stages

    with ProgressView() as view:
        view.name = path.name
        found = bisect_on(path, on, Stages(view.show))
    if plan is not None and found.plan is not None:
        found.plan.save(plan)
    if as_json:
        print_json(found.to_json())
    else:
        print_text(describe_finding(found))
    return 0


def calibrate(
    file: Path, *, only: str | None, shard: str | None, as_json: bool, output: Path, merge: tuple[Path, ...], **ask: Any
) -> int:
    """Calibrates one model of `file`; the rest of the options are those of `calibrate.Ask`."""
    from trtforge.converter.calibrate import Ask, calibrate_model, parse_shard
    from trtforge.converter.progress import Stages

    configs = select_models(file, only)
    if len(configs) > 1:
        names = ", ".join(config.name for config in configs)
        raise ConfigError(f"{file} has {len(configs)} models: {names}", fix="choose one with --only")
    request = Ask(output, shard=parse_shard(shard) if shard else None, merge=merge, **ask)
    with ProgressView() as view:
        view.name = configs[0].name
        note(name=view.name)
        done = calibrate_model(configs[0], request, Stages(view.show))
    if as_json:
        print_json(done.facts)
        return 0
    facts = {key: value for key, value in done.facts.items() if key != "sensitivity"}
    print_table("", ("fact", "value"), [[key, _plain(value)] for key, value in facts.items()])
    if "sensitivity" in done.facts:
        found = done.facts["sensitivity"]
        rows = [[n["node"], n["op"], f"{n['score']:.2f}", f"{n['gain']:+.2f}"] for n in found["layers"][:20]]
        title = f"layers by harm: {found['measure']}, {found['quantized']:.2f} with all of them quantized"
        print_table(title, ("layer", "operator", "with it in float", "gain"), rows)
    return 0


_COLUMNS = ("model", "status", "precision", "proved by", "SQNR dB", "cosine", "max err / std", "MB", "seconds")


def _row(outcome: Outcome) -> list[str]:
    seconds = f"{sum(outcome.seconds.values()):.1f}"
    facts = outcome.facts
    if not facts:
        stage = (outcome.failure and outcome.failure.stage) or ("bug" if outcome.exit_code == 1 else "process")
        return [outcome.name, f"failed ({stage})", "-", "-", "-", "-", "-", "-", seconds]
    measured: Mapping[str, Any] = facts.get("measured", {})
    size = sum(entry["size"] for name, entry in facts["files"].items() if name.startswith("model.engine"))
    size = size or sum(entry["size"] for name, entry in facts["files"].items() if name.endswith(".onnx"))
    return [
        outcome.name,
        outcome.status,
        str(facts.get("precision", "")),
        str(measured.get("runner", "")),
        _number(measured.get("sqnr_db"), ".1f"),
        _number(measured.get("cosine"), ".6f"),
        _number(measured.get("max_abs_over_std"), ".2e"),
        f"{size / 1e6:.2f}",
        seconds,
    ]


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ("-" if value is None else str(value))


def _inspection_tables(facts: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    simple = [
        [key, _plain(value)] for key, value in facts.items() if key not in ("files", "nodes", "inputs", "outputs")
    ]
    tensors = [
        [side, item["name"], item["dtype"], " x ".join(map(str, item["shape"]))]
        for side in ("inputs", "outputs")
        for item in facts.get(side, [])
    ]
    tables: list[tuple[str, tuple[str, ...], list[list[str]]]] = [
        (str(facts.get("name", "")), ("fact", "value"), simple),
        ("inputs and outputs", ("side", "name", "dtype", "shape"), tensors),
    ]
    if "nodes" in facts:
        rows = [[n["module"], n["op"], str(n["count"]), n["precision"], n["reason"]] for n in facts["nodes"]]
        tables.append(("modules", ("module", "operator", "nodes", "precision", "reason"), rows))
    if "files" in facts:
        files = [[name, f"{e['size']:,}", e["sha256"][:16]] for name, e in facts["files"].items()]
        tables.append(("files", ("file", "bytes", "SHA-256"), files))
    return tables


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
