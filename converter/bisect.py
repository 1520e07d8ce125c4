"""`trtforge bisect`: which layer of an artifact is to blame, and the exception to its plan that mends it, measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trtforge.converter.accuracy import LABELLED, WORST
from trtforge.converter.artifact import MODEL, PLAN, PROOF, REFERENCE
from trtforge.converter.carry import carry_out
from trtforge.converter.finding import Blame, Finding, Outcome
from trtforge.converter.manifest import MANIFEST, read_manifest
from trtforge.converter.mend import propose
from trtforge.converter.pieces import Open, engine_opener, open_onnx, run_with
from trtforge.converter.progress import Stages
from trtforge.converter.types import infer_types
from trtforge.runtime.device import device_facts
from trtforge.runtime.errors import ArtifactError, ConfigError, MissingDependencyError
from trtforge.runtime.graph import META_LINE, OnnxModel, describe_model, load_graph, node_module
from trtforge.runtime.onnx_runner import onnxruntime_version
from trtforge.runtime.precision import PrecisionPlan, Rule
from trtforge.runtime.publish import hash_file, scratch_folder
from trtforge.runtime.runner import Tensors
from trtforge.runtime.suggest import nearest
from trtforge.runtime.trt.backend import Backend, capabilities_of, find_backend
from trtforge.validation.bisect import Bisection, Location, Run, Side, noise_of
from trtforge.validation.compare import compare
from trtforge.validation.differences import find_differences
from trtforge.validation.golden import GoldenSet
from trtforge.validation.kinds import Symptom, decibels
from trtforge.validation.parity import Candidate, ParityReport
from trtforge.validation.symptoms import find_symptom
from trtforge.validation.tolerance import EXPORT, Tolerance, resolve_tolerance

__all__ = ["bisect_folder", "bisect_on"]

_ROUNDS = 8
"""Layers that are mended one after the other before the search gives up."""
_SAMPLES = 2
"""Samples that the search runs: the worst ones. The exception is measured on all."""
_MENDED = 0.1
"""A place is mended where a tenth, or less, of the noise that it adds is left behind it."""

_PLACES = ("auto", "onnxruntime", "engine")


def bisect_folder(folder: Path, stages: Stages, *, open_candidate: Open = open_onnx, runner: str = "") -> Finding:
    """Finds the layers to blame for the difference between an artifact's candidate and its reference.

    Args:
        folder: An artifact or `NAME.failed`; files that were altered since are noted, not refused.
        stages: Receives progress.
        open_candidate: What runs the candidate's graphs; the reference always runs on onnxruntime.
        runner: What that is called; by default onnxruntime with its version.

    Raises:
        ArtifactError: not an artifact, or it lacks reference, plan or golden set.
    """
    with stages.stage("open"):
        search = _Search(folder, stages, run_with(open_candidate), runner or f"onnxruntime {onnxruntime_version()}")
    return search.find()


def bisect_on(folder: Path, on: str, stages: Stages) -> Finding:
    """`bisect_folder` on what is at hand.

    Args:
        folder: An artifact or `NAME.failed`.
        on: "onnxruntime"; "engine": TensorRT engines of the pieces, on this GPU; "auto": that where the artifact has an
            engine and this machine a GPU that it fits, else onnxruntime.
        stages: Receives progress.

    Raises:
        ConfigError: another `on`.
        ArtifactError: as `bisect_folder`; "engine" without a GPU, or without an engine in the artifact.
    """
    if on not in _PLACES:
        raise ConfigError(f"--on is {on!r}", fix=nearest(on, _PLACES))
    backend = None if on == "onnxruntime" else _engine_backend(folder)
    if backend is None:
        if on == "engine":
            raise ArtifactError(
                f"{folder} cannot be bisected on an engine here",
                why="it holds no engine, or this machine has no GPU that its backend runs on",
                fix="use --on onnxruntime",
            )
        return bisect_folder(folder, stages)
    tf32 = bool(read_manifest(folder, check_files=False).facts["engine"]["tf32"])
    with scratch_folder() as work:
        opener = engine_opener(backend.name, work, tf32=tf32)
        return bisect_folder(folder, stages, open_candidate=opener, runner=f"{backend.name} {backend.version}")


def _engine_backend(folder: Path) -> Backend | None:
    facts = read_manifest(folder, check_files=False).facts.get("engine")
    device = device_facts()
    if facts is None or device is None:
        return None
    backend = find_backend(facts["backend"])
    return backend if backend.capabilities.runs_on(device.compute_capability) else None


def _half_products(facts: Mapping[str, Any]) -> bool:
    """As the conversion decided it: by the backend that built the engine, or would have."""
    try:
        if engine := facts.get("engine"):
            return capabilities_of(engine["backend"], engine["version"]).half_quantized_products
        return find_backend(facts["target"]["backend"]).capabilities.half_quantized_products
    except MissingDependencyError:
        return True


class _Search:
    """One bisection under way."""

    def __init__(self, folder: Path, stages: Stages, run_candidate: Run, runner: str) -> None:
        self.folder, self.stages, self.runner = folder, stages, runner
        self.run_candidate = run_candidate
        self.run_reference = run_with(open_onnx)
        manifest = read_manifest(folder, check_files=False)
        self.facts = manifest.facts
        self.notes = [
            f"{name} is not the file that {MANIFEST} names: it was altered"
            for name, entry in manifest.files.items()
            if name in (REFERENCE, MODEL, PLAN)
            and (folder / name).exists()
            and hash_file(folder / name) != entry.sha256
        ]
        for name in (REFERENCE, PLAN):
            if not (folder / name).exists():
                raise ArtifactError(f"{folder} has no {name}", fix="convert again")
        self.plan = PrecisionPlan.load(folder / PLAN)
        self.golden = self._load_samples()
        self.graph = load_graph(folder / REFERENCE)
        infer_types(self.graph)
        self.reference: OnnxModel = describe_model(self.graph, folder / REFERENCE)
        self.half_products = _half_products(self.facts)
        self.nodes = {node.name: node for node in self.graph.graph}
        self.runs = {"reference": 0, "candidate": 0}

    def _load_samples(self) -> GoldenSet:
        """The golden set; and what lost most against the accuracy budget, which may be what that set misses."""
        golden = GoldenSet.load(self.folder / PROOF)
        worst = self.folder / LABELLED / WORST
        if not worst.is_dir():
            return golden
        found = GoldenSet.load(worst).samples
        self.notes.append(
            f"{len(found)} samples that lost most against the accuracy budget are compared beside the "
            f"{len(golden.samples)} of the proof; whether the budget is kept, a conversion shows"
        )
        return replace(golden, samples=(*golden.samples, *found))

    def find(self) -> Finding:
        path = self.folder / (MODEL if (self.folder / MODEL).exists() else REFERENCE)
        candidate = load_graph(path)
        infer_types(candidate)
        tolerance = self._tolerance()
        with self.stages.stage("run", "reference and candidate"):
            right = self._outputs(self.graph, self.run_reference)
            export = self._compare(right, EXPORT)
            if not export.passed and export.verdict.value == "failed":
                return self._finish("export", (), export, None, None)
            got = self._outputs(candidate, self.run_candidate)
            before = self._compare(got, tolerance)
        with self.stages.stage("search"):
            return self._search(candidate, right, got, before)

    def _search(
        self, candidate: ir.Model, right: dict[str, Tensors], got: dict[str, Tensors], before: ParityReport
    ) -> Finding:
        blames: list[Blame] = []
        samples = self._worst_samples(right, got)
        plan = self.plan
        after: ParityReport | None = None
        for _ in range(_ROUNDS):
            search = Bisection(Side(self.graph, self.run_reference), Side(candidate, self.run_candidate), samples)
            location = search.locate()
            if location is None:
                break
            blame = self._blame(search, location)
            self._count(search)
            if before.passed:
                return self._finish("agrees", [blame], before, None, None)
            if blame.symptom.kind == "graph":
                blames.append(blame)
                return self._finish("graph", blames, before, self._carried_again(plan), None)
            mended = self._mend(blame, location, plan, samples)
            if mended is None:
                blames.append(blame)
                break
            rules, plan, candidate = mended
            blames.append(replace(blame, rules=rules))
            with self.stages.stage("measure", f"with {len(plan.rules) - len(self.plan.rules)} exceptions"):
                got = self._outputs(candidate, self.run_candidate)
                after = self._compare(got, self._tolerance())
            if after.passed:
                break
            # What is wrong now may show in other samples than what was mended.
            samples = self._worst_samples(right, got)
        if before.passed:
            return self._finish("agrees", blames, before, None, None)
        outcome: Outcome = "mended" if after is not None and after.passed else "not mended"
        return self._finish(outcome, blames, before, after, plan if after is not None else None)

    def _blame(self, search: Bisection, location: Location) -> Blame:
        piece = search.isolate(location)
        differences = find_differences(
            self.graph,
            piece,
            location.nodes,
            lambda model: self.run_reference(model, [{}])[0],
            # Without calibration the constants are the reference's.
            (lambda: self.planned) if self.plan.quantizes else None,
        )
        nodes = location.nodes
        if differences:
            symptom = Symptom("graph", "; ".join(differences))
        elif search.explains(location, piece):
            symptom = find_symptom(piece, self.run_candidate)
        elif growth := search.follow(location):
            nodes = (growth.node, *nodes)
            symptom = Symptom(
                "cancellation",
                f"what it reads has {decibels(growth.before)}, its result {decibels(growth.after)}: what is large in "
                "its inputs cancels, and their rounding stays",
            )
        else:
            symptom = find_symptom(piece, self.run_candidate)
        first = self.nodes[nodes[0]]
        line = first.metadata_props.get(META_LINE, "")
        return Blame(
            nodes,
            first.op_type,
            node_module(first),
            line,
            _code(line),
            symptom,
            location.share,
            location.before,
            location.after,
            piece.own,
        )

    def _mend(
        self, blame: Blame, location: Location, plan: PrecisionPlan, samples: Sequence[Tensors]
    ) -> tuple[tuple[Rule, ...], PrecisionPlan, ir.Model] | None:
        """The narrowest exception that leaves little of the place's noise, the plan with it, and its graph."""
        for option in propose(self.reference, plan, blame.nodes, blame.symptom, samples):
            by_id = any(rule.id is not None for rule in option.rules)
            trial = plan.with_rules(option.rules, graph=self.reference.hash if by_id else None)
            model = carry_out(self.reference, trial, self.folder, half_products=self.half_products).model
            infer_types(model)
            search = Bisection(Side(self.graph, self.run_reference), Side(model, self.run_candidate), samples)
            # With what reads the results: a tensor that overflows does so for its reader too.
            left = search.noise_behind({*option.nodes, *blame.nodes, *self._readers(blame.nodes)})
            self._count(search)
            self.stages.note(f"{'; '.join(rule.describe() for rule in option.rules)}: {decibels(left)} behind it")
            added = location.after - location.before  # noise from before the place is not its own to take away
            if math.isfinite(left) and left <= location.before + _MENDED * added:
                return option.rules, trial, model
        return None

    @functools.cached_property
    def planned(self) -> ir.Model:
        """The graph that the artifact's own plan and calibration give."""
        model = carry_out(self.reference, self.plan, self.folder, half_products=self.half_products).model
        infer_types(model)
        return model

    def _carried_again(self, plan: PrecisionPlan) -> ParityReport:
        """The plan carried out afresh on the reference: tells what the candidate should have been."""
        with self.stages.stage("measure", "the plan, carried out afresh"):
            model = carry_out(self.reference, plan, self.folder, half_products=self.half_products).model
            infer_types(model)
            return self._compare(self._outputs(model, self.run_candidate), self._tolerance())

    def _readers(self, names: Sequence[str]) -> set[str]:
        users = (user for name in names for value in self.nodes[name].outputs for user, _ in value.uses())
        return {user.name or "" for user in users} & self.nodes.keys()

    def _finish(
        self,
        outcome: Outcome,
        blames: Sequence[Blame],
        before: ParityReport,
        after: ParityReport | None,
        plan: PrecisionPlan | None,
    ) -> Finding:
        return Finding(
            self.folder, outcome, self.runner, tuple(blames), before, after, plan, tuple(self.notes), self.runs
        )

    def _tolerance(self) -> Tolerance:
        stored = self.facts.get("tolerance")
        return Tolerance.from_json(stored) if stored else resolve_tolerance([self.plan.default], {})

    def _outputs(self, model: ir.Model, run: Run) -> dict[str, Tensors]:
        results = run(model, [sample.inputs for sample in self.golden.samples])
        return {sample.name: found for sample, found in zip(self.golden.samples, results, strict=True)}

    def _compare(self, outputs: dict[str, Tensors], tolerance: Tolerance) -> ParityReport:
        name, _, version = self.runner.partition(" ")
        candidate = Candidate("precision", name, version, self.plan.default, {})
        first = next(iter(outputs.values()))
        dtypes = {name: array.dtype.name for name, array in first.items()}
        return compare(self.golden, outputs, tolerance, candidate, dtypes=dtypes)

    def _worst_samples(self, right: dict[str, Tensors], got: dict[str, Tensors]) -> list[Tensors]:
        """The smallest of the samples that err about as much as the worst: they are run many times."""
        inputs = {sample.name: sample.inputs for sample in self.golden.samples}
        noise = {name: noise_of([right[name]], [got[name]]) for name in inputs}
        bad = [name for name in inputs if noise[name] >= 0.5 * max(noise.values())]
        bad.sort(key=lambda name: sum(array.nbytes for array in inputs[name].values()))
        chosen = set(bad[:_SAMPLES])
        return [tensors for name, tensors in inputs.items() if name in chosen]

    def _count(self, search: Bisection) -> None:
        for side, count in search.runs.items():
            self.runs[side] += count


def _code(line: str) -> str:
    file, _, number = line.rpartition(":")
    try:
        text = Path(file).read_text(encoding="utf-8").splitlines()
        return text[int(number) - 1].strip()
    except (OSError, ValueError, IndexError):
        return ""
