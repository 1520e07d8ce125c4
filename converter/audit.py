"""`trtforge audit DIR`: plants faults and harmless rewrites in an artifact's ONNX, and counts what its proof does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trtforge.converter.artifact import PROOF, open_artifact
from trtforge.converter.audit_subject import Subject, make_subjects, record_held_out
from trtforge.converter.faults import FAULTS
from trtforge.converter.graph_edits import GraphEditor
from trtforge.converter.progress import Stages
from trtforge.converter.rewrites import REWRITES
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.onnx_batch import BatchRun, run_many
from trtforge.runtime.publish import staging_folder
from trtforge.validation.audit import AuditReport, Trial, rows_of
from trtforge.validation.golden import GoldenSet

__all__ = ["Ask", "audit_artifact"]

_BATCH = 24
"""Changed models that one child runs."""
_PATIENCE = 40
"""A kind of fault that failed so often in a row to make one that counts is given up."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is wanted.

    Attributes:
        faults: Faults that exceed the budget on the held-out set.
        rewrites: Harmless rewrites.
        seed: Decides them all.
        repeats: How many times the golden set's generated samples the held-out set holds, with other seeds.
        data: Further held-out batches: what `calibration.loaders.read_batches` reads; None without.
    """

    faults: int = 300
    rewrites: int = 100
    seed: int = 0
    repeats: int = 8
    data: object | None = None


def audit_artifact(path: Path, ask: Ask, stages: Stages) -> AuditReport:
    """Runs the artifact's own proof on changed models: its golden set, its limits, onnxruntime.

    The float graph is changed under the export's limits, and the graph with the plan under the plan's, half of the
    faults each where there are two. Only models that are valid ONNX, and that run at the first golden sample's shapes,
    are tried. The check of hashes, which would refuse every change, is left out.

    Raises:
        ArtifactError: not an artifact, altered, or failed.
        ParityError: the unchanged model exceeds the budget on the held-out set.
    """
    start = time.perf_counter()
    artifact = open_artifact(path)
    if artifact.status == "failed":
        raise ArtifactError(f"{path} failed its proof: there is nothing to audit", fix=f"trtforge inspect {path}")
    with staging_folder(path.absolute().parent) as work:
        with stages.stage("record", "held-out set"):
            golden = GoldenSet.load(path / PROOF)
            held_out = record_held_out(artifact, golden, repeats=ask.repeats, seed=ask.seed, data=ask.data)
            subjects = make_subjects(artifact, golden, held_out, work)
        trials: list[Trial] = []
        for index, subject in enumerate(subjects):
            with stages.stage("audit", subject.path.name):
                subject.check_unchanged()
                trials += _try_faults(subject, _part(ask.faults, index, len(subjects)), ask.seed, stages)
                trials += _try_rewrites(subject, _part(ask.rewrites, index, len(subjects)), ask.seed, stages)
    return AuditReport(
        artifact.name,
        tuple(trials),
        golden=(len(golden.samples), rows_of(golden)),
        held_out=(len(held_out.samples), rows_of(held_out)),
        wanted=(ask.faults, ask.rewrites),
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True, slots=True)
class _Planned:
    """A changed model that waits for its run."""

    path: Path
    kind: str
    what: str
    seed: int


def _try_faults(subject: Subject, wanted: int, seed: int, stages: Stages) -> list[Trial]:
    """Tries faults, of the kinds that have the fewest first, until `wanted` of them count."""
    trials: list[Trial] = []
    counted: Counter[str] = Counter()
    idle: Counter[str] = Counter()
    index = 0
    while counted.total() < wanted:
        ahead = Counter(counted)
        planned: list[_Planned] = []
        while len(planned) < _BATCH:
            alive = [kind for kind in FAULTS if idle[kind] < _PATIENCE]
            if not alive:
                break
            kind = min(alive, key=lambda name: ahead[name])
            index += 1
            made = subject.make(f"fault-{index}", _plant(kind, subject, seed, index))
            if made is None:
                idle[kind] += 1
                continue
            ahead[kind] += 1
            planned.append(_Planned(made[0], kind, made[1], index))
        if not planned:
            stages.note(f"{subject.path.name} has no place for more than {counted.total()} different faults that count")
            break
        for plan, run in zip(planned, run_many([p.path for p in planned], subject.feeds, subject.work), strict=True):
            trial = _trial(subject, run, plan, fault=True)
            if trial is None or not trial.counts:
                idle[plan.kind] += 1
            elif counted.total() < wanted:
                counted[plan.kind] += 1
                idle[plan.kind] = 0
            else:
                continue
            if trial is not None:
                trials.append(trial)
        stages.forward({"event": "progress", "phase": "faults", "done": counted.total(), "total": wanted})
    return trials


def _try_rewrites(subject: Subject, wanted: int, seed: int, stages: Stages) -> list[Trial]:
    trials: list[Trial] = []
    kinds = list(REWRITES)
    index = 0
    while len(trials) < wanted and index < 20 * wanted:
        planned: list[_Planned] = []
        while len(planned) < min(_BATCH, wanted - len(trials)) and index < 20 * wanted:
            kind = kinds[index % len(kinds)]
            index += 1
            made = subject.make(f"rewrite-{index}", _rewrite(kind, seed, index))
            if made is not None:
                planned.append(_Planned(made[0], kind, made[1], index))
        runs = run_many([plan.path for plan in planned], subject.feeds, subject.work)
        found = [_trial(subject, run, plan, fault=False) for plan, run in zip(planned, runs, strict=True)]
        trials += [trial for trial in found if trial is not None]
        stages.forward({"event": "progress", "phase": "rewrites", "done": len(trials), "total": wanted})
    return trials


def _trial(subject: Subject, run: BatchRun, plan: _Planned, *, fault: bool) -> Trial | None:
    found = subject.judged(run)
    if found is None:
        return None
    return Trial(
        kind=plan.kind,
        what=plan.what,
        seed=plan.seed,
        stage=subject.stage,
        fault=fault,
        proof=found.proof,
        held_out=found.held_out,
        held_out_reason=found.reason,
        polygraphy=found.polygraphy,
        polygraphy_own=found.polygraphy_own,
    )


def _plant(kind: str, subject: Subject, seed: int, index: int) -> Callable[[GraphEditor], str | None]:
    return lambda edit: FAULTS[kind](edit, np.random.default_rng([seed, index, 2]), subject.scene)


def _rewrite(kind: str, seed: int, index: int) -> Callable[[GraphEditor], str | None]:
    def change(edit: GraphEditor) -> str | None:
        random = np.random.default_rng([seed, index, 3])
        first = REWRITES[kind](edit, random)
        if first is None:
            return None
        others = random.choice(list(REWRITES), int(random.integers(0, 3)))  # an optimizer does more than one thing
        return "; ".join([first, *filter(None, (REWRITES[str(other)](edit, random) for other in others))])

    return change


def _part(total: int, index: int, parts: int) -> int:
    return total // parts + (index < total % parts)
