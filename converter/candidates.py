"""Candidate plans made real and measured: the search's callables, on onnxruntime and, with a GPU, on the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtforge.converter.assign import FLOAT_TYPES, assign
from trtforge.converter.cost import NOMINAL, count_macs
from trtforge.converter.data import read_data
from trtforge.converter.output_error import relative_error
from trtforge.converter.prove import Bench, prove_engine, prove_onnx, runnable_onnx
from trtforge.converter.quantize import Quantization, make_placement, narrow
from trtforge.converter.search import Errors, Group, Harm, Score, Unit
from trtforge.converter.types import infer_types
from trtforge.runtime.child import ChildCrashError
from trtforge.runtime.errors import ArtifactError, BuildError, ParityError
from trtforge.runtime.graph import OnnxModel, load_graph, node_refs
from trtforge.runtime.onnx_runner import run_onnx
from trtforge.runtime.precision import QUANTIZED, NodeRef, Precision, PrecisionPlan, Rule
from trtforge.runtime.runner import Tensors
from trtforge.runtime.tensors import save_tensors
from trtforge.validation.accuracy import AccuracyResult, Budget
from trtforge.validation.accuracy_forecast import foresee
from trtforge.validation.golden import load_outputs
from trtforge.validation.parity import ParityReport
from trtforge.validation.tolerance import resolve_tolerance

if TYPE_CHECKING:
    from trtforge.converter.accuracy import LabelledSet, Run
    from trtforge.converter.config import ConversionConfig
    from trtforge.runtime.specs import InputSpec
    from trtforge.runtime.trt.build import BuiltEngine

__all__ = ["Engines", "Realize", "Workbench"]

_CALIBRATION_BATCHES = 4
_FAILING = 4

Realize = Callable[[PrecisionPlan, "Quantization | None", Path], tuple[OnnxModel, set[Precision], PrecisionPlan]]
"""Carries a plan out: the model (the reference where nothing changes), what it uses, the plan with its reasons."""


@dataclass(frozen=True, slots=True)
class Engines:
    """How engines are made and timed on this machine's GPU."""

    build: Callable[[OnnxModel, PrecisionPlan, Path], BuiltEngine]
    latency_ms: Callable[[BuiltEngine, bool], float]
    """Of an engine, and whether it was built with TF32 allowed."""


@dataclass(slots=True)
class Workbench:
    """Everything that measuring a plan takes.

    Attributes:
        config: What is wanted.
        reference: The float graph.
        specs: Its inputs.
        bench: The golden set and where to work.
        labelled: The labelled samples that looks are judged on; None where no budget is given.
        calibration: Live calibration data.
        realize: Carries a plan out.
        calibrate: Ranges for all that a plan quantizes.
        guard: Adds what the overflow guard says.
        engines: None where none can run.
        others: How many samples the budget is judged on, where the labelled ones are the search's own; else None.
        error: Of each bound, so that all looks together are wrong no more often than was promised.
        evaluations: How many plans were run so far.
        looks: How many of those as a whole, by `look`.
    """

    config: ConversionConfig
    reference: OnnxModel
    specs: tuple[InputSpec, ...]
    bench: Bench
    labelled: LabelledSet | None
    calibration: object | None
    realize: Realize
    calibrate: Callable[[PrecisionPlan], Quantization]
    guard: Callable[[PrecisionPlan], PrecisionPlan] = lambda plan: plan
    engines: Engines | None = None
    others: int | None = None
    error: float = 0.05
    evaluations: int = 0
    looks: int = 0
    _ranges: dict[tuple[Precision, Precision], Quantization] = field(default_factory=dict)
    _macs: dict[str, int] = field(default_factory=dict)
    _refs: list[NodeRef] = field(default_factory=list)

    @property
    def refs(self) -> list[NodeRef]:
        """The reference's nodes."""
        if not self._refs:
            self._refs = node_refs(load_graph(self.reference.path))
        return self._refs

    @property
    def macs(self) -> Mapping[str, int]:
        """Multiply-accumulates by node, at the first profile's opt sizes."""
        if not self._macs:
            sizes = {name: dim.opt for name, dim in self.config.profiles[0].items()}
            self._macs = count_macs(self.reference.path, sizes)
        return self._macs

    def quantization(self, plan: PrecisionPlan) -> Quantization | None:
        """What `plan` quantizes, in ranges that were found once for all of it; None where it quantizes nothing."""
        formats = {plan.default, *(rule.precision for rule in plan.rules)} & QUANTIZED
        if not formats:
            return None
        kind = plan.default if plan.default in formats else min(formats)
        key = kind, plan.base  # fitted codes belong to scales that are exact in the base
        if key not in self._ranges:
            self._ranges[key] = self.calibrate(replace(self._user_plan(kind), base=plan.base))
        # With one convolution back in float, a residual Add may quantize its other branch, which has no range.
        return narrow(self._ranges[key], self.reference, plan) or self.calibrate(plan)

    def units(self, plan: PrecisionPlan, low: Precision) -> list[Unit]:
        """The layers that `plan` runs in `low` because it is the default: what a search may put back."""
        assigned = plan.resolve(self.refs, graph=self.reference.hash)
        free = {name for name, found in assigned.items() if found.rule is None}
        if low in QUANTIZED:
            found = [name for name in make_placement(self.reference, plan).nodes if name in free]
        else:
            graph = load_graph(self.reference.path)
            infer_types(graph)
            decisions = assign(graph, plan, graph=self.reference.hash).values()
            found = [d.id for d in decisions if d.dtype == FLOAT_TYPES[low] and d.id in free]
        total = sum(self.macs.values()) or 1
        return [Unit(name, self.macs.get(name, 0) / total) for name in found]

    def harm(self, low: Precision, base: Precision, feeds: Path) -> Harm | None:
        """Measures layers alone in `low`, all else in float32, on the samples in `feeds`; `base` is the plans'.

        None, with a note, where the float graph itself does not run on these samples.
        """
        truth = self.bench.work / "harm-truth.safetensors"
        try:
            run_onnx(self.reference.path, feeds, truth, disable_quant_qdq=True)
        except (ChildCrashError, ParityError) as error:
            self.bench.stages.note(f"{low} is not mended: on its samples the float graph does not run: {error.what}")
            return None
        wanted = load_outputs(truth)
        whole = self.quantization(replace(self._user_plan(low), base=base)) if low in QUANTIZED else None

        def measure(units: Sequence[Unit]) -> Errors | None:
            chosen = {unit.id for unit in units}
            if whole is not None:
                others = frozenset(whole.placement.nodes) - chosen
                part = replace(whole, placement=whole.placement.without(others))
                model, used, _ = self.realize(PrecisionPlan("fp32"), part, self.bench.work / "harm.onnx")
            else:
                rules = tuple(Rule(low, id=unit.id, origin="accuracy") for unit in units)
                plan = PrecisionPlan("fp32", rules, graph=self.reference.hash)
                model, used, _ = self.realize(plan, None, self.bench.work / "harm.onnx")
            run, _ = runnable_onnx(model, used, self.bench.work / "harm-emulated.onnx")
            self.evaluations += 1
            results = self.bench.work / "harm.safetensors"
            try:
                run_onnx(run.path, feeds, results, disable_quant_qdq=True)
            except (ChildCrashError, ParityError):
                return None
            return relative_error(wanted, load_outputs(results))

        return measure

    def calibration_feeds(self) -> Path:
        """A few batches of the calibration data: independent of what the budget is judged on."""
        calibration = self.config.calibration
        loader = calibration.loader if calibration else None
        found = read_data(self.config, loader, self.calibration, self.specs, _CALIBRATION_BATCHES)
        batches = list(found or (sample.inputs for sample in self.bench.golden.samples))
        return self._save_feeds({f"batch-{number}": batch for number, batch in enumerate(batches)})

    def failing_feeds(self, score: Score) -> Path:
        """The golden and the labelled samples on which a look went wrong most."""
        names = score.facts.get("failing", ())
        samples = {s.name: s.inputs for s in self.bench.golden.samples if s.name in names}
        if self.labelled is not None:
            chosen = score.facts.get("worst", ())
            samples |= {s.name: s.inputs for s in self.labelled.batches(chosen, _FAILING)}
        if not samples:
            smallest = sorted(self.bench.golden.samples, key=lambda s: sum(a.nbytes for a in s.inputs.values()))
            samples = {s.name: s.inputs for s in smallest[:_FAILING]}
        return self._save_feeds(samples)

    def rules(self, groups: Sequence[Group], low: Precision, high: Precision, module_scope: bool = True) -> list[Rule]:
        """Rules that put groups back, each with what was measured for its reason."""
        return [
            self._rule(unit, group, low, high, module_scope=module_scope) for group in groups for unit in group.units
        ]

    def look(self, plan: PrecisionPlan) -> Score:
        """Runs a plan over everything: the golden set, the labelled samples, and on a GPU the engine and a clock.

        A candidate that TensorRT does not build, or whose engine breaks, has not passed; facts say "unbuilt".
        """
        self.evaluations += 1
        self.looks += 1
        place = self.bench.work / "candidate.onnx"
        model, used, _ = self.realize(plan, self.quantization(plan), place)
        tolerance = resolve_tolerance(sorted(used), self.config.validation.tolerance)
        report: ParityReport | None = None
        run: Run | None = None
        latency: float | None = None
        size, tf32 = _file_size(model.path), plan.float_default == "tf32"
        try:
            if self.engines is not None:
                engine = self.engines.build(model, plan, self.bench.work / "candidate.engine")
                size = engine.size_bytes
                report = prove_engine(
                    engine.path, engine.backend, self.bench, graph=model.hash, inputs=model.inputs,
                    outputs=model.outputs, precision=plan.default, tolerance=tolerance, tf32=tf32,
                )  # fmt: skip
                latency = self.engines.latency_ms(engine, tf32)
                if self.labelled is not None:
                    run = self.labelled.run_engine(engine.path, engine.backend, model.inputs, tf32=tf32)
            else:
                if model is not self.reference:
                    report = prove_onnx(
                        model, self.bench, stage="precision", precision=plan.default, used=used, tolerance=tolerance
                    )
                if self.labelled is not None:
                    run = self.labelled.run_onnx(model, used, "candidate")
        except BuildError as error:
            return Score(False, error.what, None, math.inf, {"size": size, "unbuilt": True})
        except (ParityError, ArtifactError, ChildCrashError) as error:  # this candidate's engine; others may run
            return Score(False, error.what, None, math.inf, {"size": size})
        return self._score(plan, used, report, run, latency, size)

    def _score(
        self,
        plan: PrecisionPlan,
        used: set[Precision],
        report: ParityReport | None,
        run: Run | None,
        latency: float | None,
        size: int,
    ) -> Score:
        shares = self.shares(plan)
        facts: dict[str, Any] = {"size": size, "latency_ms": latency, "shares": shares, "used": sorted(used)}
        passed, reasons, shrinks = True, [], []
        if report is not None:
            facts["sqnr_db"] = min((o.pooled.sqnr_db for o in report.outputs if o.pooled is not None), default=None)
            if not report.passed:
                passed = False
                reasons.append("; ".join(report.reasons[:2]))
                shrinks.append(_parity_shrink(report))
                facts["failing"] = _failing(report)
        if run is not None and self.labelled is not None:
            result = self.labelled.judge(run, "precision", "", error=self.error)
            if self.others is not None:
                result = foresee(result, self.labelled.budget, self.others)
            facts |= {"accuracy": result, "worst": self.labelled.worst(run)}
            passed = passed and result.verdict == "passed"
            reasons.append(result.reason)
            shrinks.append(_accuracy_shrink(result, self.labelled.budget))
        known = [shrink for shrink in shrinks if shrink is not None]
        shrink = min(known) if known and len(known) == len(shrinks) else None
        cost = latency if latency is not None else sum(NOMINAL[kind] * share for kind, share in shares.items())
        return Score(passed, "; ".join(reasons) or "equal to the reference", shrink, cost, facts)

    def shares(self, plan: PrecisionPlan) -> dict[str, float]:
        """The share of multiply-accumulates that runs in each precision."""
        total = sum(self.macs.values())
        graph = load_graph(self.reference.path)
        infer_types(graph)
        found = {d.id: d.precision for d in assign(graph, plan, graph=self.reference.hash).values()}
        quantization = self.quantization(plan)
        if quantization is not None:
            found |= {use.node: t.format for t in quantization.placement.tensors for use in t.uses}
        shares: dict[str, float] = {}
        for name, work in self.macs.items():
            if work and name in found:
                shares[found[name]] = shares.get(found[name], 0.0) + work / total
        return shares or {plan.float_default: 1.0}

    def _user_plan(self, kind: Precision) -> PrecisionPlan:
        return replace(self.config.plan, default=kind)

    def _rule(self, unit: Unit, group: Group, low: Precision, high: Precision, *, module_scope: bool) -> Rule:
        ref = next(ref for ref in self.refs if ref.id == unit.id)
        others = len(group.units) + group.beside - 1
        who = f"with {others} beside it" if others else "alone"
        what = "gives NaN or Inf" if math.isinf(group.harm) else f"leaves {_decibel(group.harm):.1f} dB"
        reason = f"{who} in {low} and all else in float32 it {what}"
        rule = Rule(high, module=ref.module, op=ref.op, origin="accuracy", reason=reason)
        if module_scope and ref.module and [other.id for other in self.refs if rule.matches(other)] == [unit.id]:
            return rule
        return Rule(high, id=unit.id, origin="accuracy", reason=reason)

    def _save_feeds(self, samples: Mapping[str, Tensors]) -> Path:
        place = self.bench.work / "harm-feeds.safetensors"
        save_tensors(place, {f"{name}/{key}": array for name, feeds in samples.items() for key, array in feeds.items()})
        return place


def _decibel(power: float) -> float:
    return -10 * math.log10(power) if power > 0 else 300.0


def _file_size(path: Path) -> int:
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


def _failing(report: ParityReport) -> list[str]:
    """Samples that did not meet their limits, the worst first."""
    found: dict[str, float] = {}
    for output in report.outputs:
        for sample in output.samples:
            if sample.unmet or sample.measures.candidate_nonfinite or not math.isfinite(sample.measures.sqnr_db):
                found[sample.sample] = min(found.get(sample.sample, math.inf), sample.measures.sqnr_db)
    return sorted(found, key=lambda name: found[name])[:_FAILING]


def _parity_shrink(report: ParityReport) -> float | None:
    """By what factor the error has to shrink for every limit on its size to hold; None where it is not finite."""
    factors = []
    for output in report.outputs:
        pooled, limits = output.pooled, report.tolerance
        if pooled is None or pooled.candidate_nonfinite or not math.isfinite(pooled.sqnr_db):
            return None
        if limits.sqnr_db is not None:
            factors.append(10 ** ((pooled.sqnr_db - limits.sqnr_db) / 20))
        if limits.cosine is not None and pooled.cosine < limits.cosine:
            factors.append(math.sqrt((1 - limits.cosine) / (1 - pooled.cosine)))
        if limits.max_abs_over_std is not None and pooled.max_abs_over_std > 0:
            factors.append(limits.max_abs_over_std / pooled.max_abs_over_std)
    return min(factors, default=None)


def _accuracy_shrink(result: AccuracyResult, budget: Budget) -> float | None:
    """By what factor the error may grow, or has to shrink, for the drop's upper bound to meet the budget.

    The drop goes with the error's amplitude (answers change where their margin is smaller than the error), and the
    bound's width with the root of the drop, as a count's does.
    """
    if result.not_finite:
        return None
    allowed = budget.max_drop
    if budget.min is not None:
        allowed = min(allowed, result.reference - budget.min)
    width = max(result.upper - result.drop, 1e-9)
    if allowed <= 0:
        return None
    if result.drop <= 0:
        return (allowed / width) ** 2 if result.verdict != "passed" else None
    root = (math.sqrt(width**2 + 4 * result.drop * allowed) - width) / (2 * result.drop)
    return root**2
