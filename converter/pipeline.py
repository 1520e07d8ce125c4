"""The order of things: source, export, golden set, plan, casts, build, proof, package. Nothing else knows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtforge.converter.artifact import ENGINE, FAILED_SUFFIX, MODEL, PROOF, Artifact
from trtforge.converter.config import Calibration, ConversionConfig
from trtforge.converter.data import read_data
from trtforge.converter.network import check_network, network_source
from trtforge.converter.package import Package, publish_package
from trtforge.converter.profiles import engine_profiles, engine_values
from trtforge.converter.progress import Stages
from trtforge.converter.recipe import Recipe
from trtforge.converter.reference import make_reference
from trtforge.converter.sources import LoadedModel, load_source
from trtforge.runtime.errors import BuildError, ConfigError, ParityError
from trtforge.runtime.graph import OnnxModel
from trtforge.runtime.precision import Precision, PrecisionPlan, Rule
from trtforge.runtime.publish import check_replaceable, discard_folder, staging_folder
from trtforge.runtime.specs import InputSpec

if TYPE_CHECKING:
    from trtforge.converter.accuracy import LabelledSet, Run
    from trtforge.converter.auto import Choice
    from trtforge.converter.prove import Bench
    from trtforge.converter.quantize import Quantization
    from trtforge.runtime.runner import Runner, Tensors
    from trtforge.runtime.trt.backend import Backend
    from trtforge.runtime.trt.build import BuiltEngine
    from trtforge.validation.parity import ParityReport, Stage
    from trtforge.validation.tolerance import Tolerance

__all__ = ["LiveData", "convert_config", "run_pipeline"]


@dataclass(frozen=True, slots=True)
class LiveData:
    """Data that Python gave as objects; YAML names functions instead."""

    validation: object | None = None
    calibration: object | None = None
    accuracy: object | None = None
    search: object | None = None


def convert_config(config: ConversionConfig, target: Path, stages: Stages) -> Artifact:
    """Loads the configuration's source and runs the pipeline."""
    with stages.stage("load"):
        loaded = load_source(config)
        recipe = Recipe.record(config)
    return run_pipeline(config, loaded, target, stages, recipe=recipe)


def run_pipeline(
    config: ConversionConfig,
    loaded: LoadedModel,
    target: Path,
    stages: Stages,
    live: LiveData | None = None,
    *,
    recipe: Recipe | None = None,
) -> Artifact:
    """Converts a loaded model and publishes its artifact at `target`.

    A failed proof publishes nothing there and leaves `target.failed`; any other failure leaves nothing.

    Args:
        config: What is wanted.
        loaded: The model.
        target: The artifact's folder.
        stages: Receives progress; its `seconds` are filled.
        live: Data from Python.
        recipe: What the model was made from, for `find_unchanged`; None for one from Python.

    Raises:
        TrtForgeError: as each stage raises.
    """
    _check_tf32(config.plan)
    check_replaceable(target)  # rather now than after an hour's work
    backend = find_buildable(config, stages)
    if config.source.network is not None:
        check_network(config, backend is not None and _runs_here(backend))
    with staging_folder(target.parent) as staging:
        folder, work = staging / "artifact", staging / "work"
        folder.mkdir()
        work.mkdir()
        run = _Run(config, loaded, backend, folder, work, stages, live or LiveData())
        failure: ParityError | None = None
        try:
            package = run.convert()
        except ParityError as error:
            if run.package is None:
                raise
            failure, package = error, run.package
        with stages.stage("package"):
            package.recipe = recipe
            failed_place = target.with_name(target.name + FAILED_SUFFIX)
            place = failed_place if failure else target
            artifact = publish_package(package, folder, place, failed=failure)
            if failure is None:
                discard_folder(failed_place, staging)
    if failure is not None:
        failure.fix = "; ".join(
            part for part in (failure.fix, f"everything needed to find out why is in {place}") if part
        )
        raise failure
    return artifact


@dataclass(slots=True)
class _Run:
    """One conversion under way. `package` is what there would be to show if the next proof fails."""

    config: ConversionConfig
    loaded: LoadedModel
    backend: Backend | None
    folder: Path
    work: Path
    stages: Stages
    live: LiveData
    package: Package | None = None

    def convert(self) -> Package:
        from trtforge.converter.quantize import save_calibration
        from trtforge.validation.tolerance import resolve_tolerance

        stages, plan = self.stages, self.config.plan
        with stages.stage("export"):
            made = make_reference(self.config, self.loaded, self.backend, self.folder)
            reference, specs = made.model, made.specs
            for note in made.notes:
                stages.note(note)
        with stages.stage("record"):
            bench = self._record(specs, made.runner)
            labelled = self._record_labelled(specs, made.runner)
            trial = self._record_trial(specs, made.runner)
        package = self.package = Package(
            config=self.config,
            loaded=self.loaded,
            specs=specs,
            reference=reference,
            model=reference,
            plan=plan,
            golden=bench.golden,
            accuracy=labelled.report() if labelled else None,
        )
        with stages.stage("prove", "onnxruntime, float graph"):
            report = self._prove_export(reference, bench)
            package.reports.append(report)
            report.raise_unless_passed()
        quantization, error = None, None
        if self.config.search.wanted(plan, budget=labelled is not None):
            with stages.stage("search"):
                looks = labelled if trial is None else trial
                others = None if labelled is None or trial is None else labelled.reference.count
                choice = self._search(plan, reference, specs, bench, looks, others=others)
            package.search = choice.to_json() | {"own_samples": None if trial is None else trial.reference.count}
            package.plan, quantization = choice.plan, choice.quantization
            error = choice.error if trial is None else None
            self.config = package.config = replace(self.config, plan=choice.plan)
            if quantization is not None:
                save_calibration(self.folder, quantization)
        else:
            with stages.stage("plan"):
                package.plan = self._guard(plan, reference, bench)
            if package.plan.quantizes:
                with stages.stage("calibrate"):
                    quantization = self._calibrate(package.plan, reference, specs)
                    save_calibration(self.folder, quantization)
        package.quantization = quantization
        with stages.stage("cast"):
            model, used, package.plan = self._cast(package.plan, reference, quantization, self.folder / MODEL)
        package.model, package.used = model, used
        tolerance = package.tolerance = resolve_tolerance(sorted(used), self.config.validation.tolerance)
        if model is not reference:
            with stages.stage("prove", "onnxruntime, with the plan"):
                package.reports.append(self._prove_model(model, bench, used, tolerance))
        if labelled is not None:
            with stages.stage("prove", "onnxruntime, labelled samples"):
                self._score(package, labelled, labelled.run_onnx(model, used), "precision", error)
        runs_here = self.backend is not None and _runs_here(self.backend)
        if not runs_here:
            self._require(package)
        if self.backend is not None:
            with stages.stage("build", str(self.backend)):
                package.engine = self._build(model, specs)
        if package.engine is not None and runs_here:
            with stages.stage("prove", "engine on the GPU"):
                package.reports.append(self._prove_engine(package.engine, model, bench, tolerance))
                if labelled is not None:
                    ran = labelled.run_engine(
                        package.engine.path,
                        package.engine.backend,
                        model.inputs,
                        tf32=self.config.plan.float_default == "tf32",
                    )
                    self._score(package, labelled, ran, "engine", error)
            self._require(package)
        return package

    def _record(self, specs: tuple[InputSpec, ...], runner: Runner) -> Bench:
        from trtforge.converter.prove import Bench
        from trtforge.runtime.inputs import has_extremes
        from trtforge.validation.golden import plan_points, record

        # Beyond calibrated ranges a quantized plan saturates by design: extremes would be held against it.
        calibrated = self.config.calibration is not None or self.live.calibration is not None
        quantizes = self.config.plan.quantizes or (self.config.search.auto and calibrated)
        points = plan_points(self.config.profiles, extremes=has_extremes(specs) and not quantizes)
        golden = record(runner, specs, points, real=self._real_inputs(specs))
        proof = self.folder / PROOF
        golden.save(proof)
        return Bench(golden, proof, self.work, self.stages)

    def _real_inputs(self, specs: tuple[InputSpec, ...]) -> Iterable[Tensors]:
        validation = self.config.validation
        return read_data(self.config, validation.loader, self.live.validation, specs, validation.batches) or ()

    def _calibrate(self, plan: PrecisionPlan, reference: OnnxModel, specs: tuple[InputSpec, ...]) -> Quantization:
        from trtforge.calibration.ranges import Ranges
        from trtforge.converter.quantize import (
            Quantization,
            find_ranges,
            fit_settings,
            make_placement,
            read_ranges,
        )

        placement = make_placement(reference, plan)
        calibration = self.config.calibration or Calibration()
        if placement.existing:
            self.stages.note(f"the model carries {placement.existing} DequantizeLinear: it is not calibrated again")
            return Quantization(placement, Ranges({}))
        if calibration.ranges is not None:
            found = read_ranges(calibration.ranges, reference, plan, fit_settings(calibration))
            if found.fit is None:
                self.stages.note(
                    f"weights get their nearest codes: no fit for these ranges is beside {calibration.ranges}"
                )
        else:
            live = self.live.calibration
            found = find_ranges(self.config, live, reference, plan, specs, self.stages, work=self.work)
        return found

    def _prove_export(self, reference: OnnxModel, bench: Bench) -> ParityReport:
        from trtforge.converter.prove import prove_onnx

        used: set[Precision] = {"fp32"}
        tolerance = _export_tolerance(self.config.validation.tolerance)
        return prove_onnx(reference, bench, stage="export", precision="fp32", used=used, tolerance=tolerance)

    def _guard(self, plan: PrecisionPlan, reference: OnnxModel, bench: Bench) -> PrecisionPlan:
        floats = (plan.float_default, *(rule.precision for rule in plan.rules))
        if "fp16" not in floats or self.config.source.network is not None:
            return plan  # bfloat16 has float32's range
        from trtforge.converter.overflow import overflow_rules

        rules = overflow_rules(reference, (sample.inputs for sample in bench.golden.samples), plan)
        for rule in rules:
            self.stages.note(f"{rule.id} stays in {rule.precision}: {rule.reason}")
        return plan.with_rules(rules, graph=reference.hash) if rules else plan

    def _cast(
        self, plan: PrecisionPlan, reference: OnnxModel, quantization: Quantization | None, place: Path
    ) -> tuple[OnnxModel, set[Precision], PrecisionPlan]:
        if self.config.source.network is not None:
            return reference, {plan.float_default}, plan  # the network's own types are what they are
        if quantization is None and plan.float_default in ("fp32", "tf32") and not plan.rules:
            return reference, {plan.float_default}, plan
        from trtforge.converter.carry import carry
        from trtforge.converter.types import check_types
        from trtforge.runtime.graph import save_graph

        half_products = self.backend is None or self.backend.capabilities.half_quantized_products
        carried = carry(reference, plan, quantization, half_products)
        used = set(carried.used)
        if used <= {"fp32", "tf32"} and plan.keep_io:
            return reference, used, plan
        check_types(carried.model)
        # What an operator's types or a weight's size decided belongs into the plan, with its reason.
        kept = [
            Rule(decision.precision, id=decision.id, origin=decision.origin, reason=decision.reason)
            for decision in carried.decisions
            if decision.origin in ("type", "overflow") and not any(rule.id == decision.id for rule in plan.rules)
        ]
        reasoned = plan.with_rules(kept, graph=reference.hash) if kept else plan
        return save_graph(carried.model, place), used, reasoned

    def _prove_model(self, model: OnnxModel, bench: Bench, used: set[Precision], tolerance: Tolerance) -> ParityReport:
        from trtforge.converter.prove import prove_onnx

        plan = self.config.plan
        return prove_onnx(model, bench, stage="precision", precision=plan.default, used=used, tolerance=tolerance)

    def _search(
        self,
        plan: PrecisionPlan,
        reference: OnnxModel,
        specs: tuple[InputSpec, ...],
        bench: Bench,
        labelled: LabelledSet | None,
        *,
        others: int | None,
    ) -> Choice:
        from trtforge.converter.auto import choose_plan
        from trtforge.converter.candidates import Engines, Workbench

        engines = None
        if self.backend is not None and _runs_here(self.backend):
            from trtforge.runtime.trt.execute import time_engine
            from trtforge.validation.golden import INPUTS_FILE

            engines = Engines(
                build=lambda model, plan, place: self._build(model, specs, place, plan),
                latency_ms=lambda engine, tf32: time_engine(
                    engine.path,
                    engine.backend,
                    bench.proof / INPUTS_FILE,
                    tf32=tf32,
                    version_compatible=self.config.target.options.version_compatible,
                    plugins=self.config.target.options.plugins,
                ),
            )
        tools = Workbench(
            config=self.config,
            reference=reference,
            specs=specs,
            bench=bench,
            labelled=labelled,
            calibration=self.live.calibration,
            realize=lambda plan, quantization, place: self._cast(plan, reference, quantization, place),
            calibrate=lambda plan: self._calibrate(plan, reference, specs),
            guard=lambda plan: self._guard(plan, reference, bench),
            engines=engines,
            others=others,
        )
        has_data = self.config.calibration is not None or self.live.calibration is not None
        candidates = self.config.search.chosen(plan, timed=engines is not None, calibrated=has_data)
        return choose_plan(tools, plan, self.config.search, candidates)

    def _build(
        self,
        model: OnnxModel,
        specs: tuple[InputSpec, ...],
        place: Path | None = None,
        plan: PrecisionPlan | None = None,
    ) -> BuiltEngine:
        from trtforge.runtime.trt.build import BuildRequest, build_engine

        assert self.backend is not None
        target = self.config.target
        request = BuildRequest(
            onnx=model.path,
            engine=place or self.folder / ENGINE,
            backend=self.backend.name,
            profiles=engine_profiles(specs, self.config.profiles),
            values=engine_values(specs, self.config.profiles),
            tf32=(plan or self.config.plan).float_default == "tf32",
            compute_capabilities=target.compute_capabilities,
            options=target.options,
            network=network_source(self.config),
        )
        try:
            built = build_engine(request, on_event=self.stages.forward)
        except BuildError as error:
            _add_quantization_problems(error, model)
            raise
        wanted = {(s.name, s.dtype) for s in (*model.inputs, *model.outputs)}
        got = {(s.name, s.dtype) for s in (*built.inputs, *built.outputs)}
        if wanted != got:
            raise BuildError(
                f"the engine's inputs and outputs are {sorted(got)}, the model's are {sorted(wanted)}",
                why="TensorRT changed a name or type while it parsed"
                if request.network is None
                else f"the network of {request.network.reference} is compared with the model by name and type",
                fix="give such outputs another dtype in the model"
                if request.network is None
                else "name the network's tensors as the model's are (`outputs` renames those), and cast outputs",
            )
        return built

    def _prove_engine(self, engine: BuiltEngine, model: OnnxModel, bench: Bench, tolerance: Tolerance) -> ParityReport:
        from trtforge.converter.prove import prove_engine

        return prove_engine(
            engine.path,
            engine.backend,
            bench,
            graph=model.hash,
            inputs=model.inputs,
            outputs=model.outputs,
            precision=self.config.plan.default,
            tolerance=tolerance,
            tf32=self.config.plan.float_default == "tf32",
            version_compatible=self.config.target.options.version_compatible,
            plugins=self.config.target.options.plugins,
        )

    def _record_labelled(self, specs: tuple[InputSpec, ...], runner: Runner) -> LabelledSet | None:
        if self.config.validation.accuracy is None:
            return None
        from trtforge.converter.accuracy_record import record_labelled

        return record_labelled(self.config, self.live.accuracy, specs, runner, self.work / "labelled", self.stages)

    def _record_trial(self, specs: tuple[InputSpec, ...], runner: Runner) -> LabelledSet | None:
        """Labelled samples that the search looks at in the budget's place; None where it has none of its own."""
        search, accuracy = self.config.search, self.config.validation.accuracy
        if accuracy is None or (search.loader is None and self.live.search is None):
            return None
        from trtforge.converter.accuracy_record import record_labelled

        accuracy = replace(accuracy, loader=search.loader, batches=None)
        config = replace(self.config, validation=replace(self.config.validation, loader=None, accuracy=accuracy))
        return record_labelled(config, self.live.search, specs, runner, self.work / "trial", self.stages)

    def _score(self, package: Package, labelled: LabelledSet, run: Run, stage: Stage, error: float | None) -> None:
        from trtforge.converter.accuracy import LABELLED

        assert package.accuracy is not None
        result = labelled.judge(run, stage, package.model.hash, **({} if error is None else {"error": error}))
        package.accuracy = replace(package.accuracy, results=(*package.accuracy.results, result))
        if result.verdict != "passed":
            labelled.save_failure(run, self.folder / LABELLED)

    def _require(self, package: Package) -> None:
        try:
            package.proof.raise_unless_passed()
            if package.accuracy is not None:
                package.accuracy.raise_unless_passed()
        except ParityError as error:
            error.stage = "prove"
            raise


def find_buildable(config: ConversionConfig, stages: Stages) -> Backend | None:
    """The backend that builds here; None, with a note, where only a portable artifact can be made.

    Raises:
        MissingDependencyError: no TensorRT is installed, and the configuration does not name the full one.
        ConfigError: the target has an option that the backend lacks.
    """
    from trtforge.runtime.device import gpu_present
    from trtforge.runtime.errors import MissingDependencyError
    from trtforge.runtime.trt.backend import find_backend
    from trtforge.runtime.trt.options import check_options
    from trtforge.runtime.trt.plugins import check_plugins

    try:
        backend = find_backend(config.target.backend)
        check_options(config.target.options, backend)
    except MissingDependencyError as error:
        if config.target.backend == "auto":
            raise
        check_plugins(config.target.options.plugins)
        stages.note(f"no engine is built here: {error.what}; the artifact will be portable")
        return None
    if backend.capabilities.needs_gpu_to_build and not gpu_present():
        stages.note(
            f"{backend} builds on the GPU that it runs on, and there is none here: the artifact will be portable"
        )
        return None
    return backend


def _add_quantization_problems(error: BuildError, model: OnnxModel) -> None:
    """A parser says of Q/DQ that came with the model what it has, and not what to do."""
    from trtforge.calibration.existing import inspect_existing
    from trtforge.runtime.graph import load_graph

    found = inspect_existing(load_graph(model.path))
    if found is not None and not found.ours and found.problems:
        first = found.problems[0]
        count = len(found.problems)
        more = f" (and {count - 1} more like it)" if count > 1 else ""
        error.why = "\n       ".join(filter(None, [f"{first.node}: {first.what}{more}", error.why]))
        error.fix = first.fix


def _check_tf32(plan: PrecisionPlan) -> None:
    rule = next((rule for rule in plan.rules if rule.precision == "tf32"), None)
    if rule is not None and plan.float_default != "tf32":
        raise ConfigError(
            f"precision rule `{rule.describe()}` asks for tf32 in a plan of {plan.float_default}",
            why="TensorRT switches TF32 for a whole engine, not for single nodes",
            fix="make tf32 the plan's default (or `base`), or give those nodes fp32",
        )


def _runs_here(backend: Backend) -> bool:
    from trtforge.runtime.device import device_facts

    device = device_facts()
    return device is not None and backend.capabilities.runs_on(device.compute_capability)


def _export_tolerance(overrides: Any) -> Tolerance:
    """The float graph is held to fp32's limits, whatever the plan; only a user's looser limit loosens it."""
    from trtforge.validation.tolerance import EXPORT

    looser = {name: value for name, value in overrides.items() if _is_looser(name, value, getattr(EXPORT, name))}
    return replace(EXPORT, **looser)


def _is_looser(name: str, value: float, default: float | None) -> bool:
    if default is None:
        return False
    return value < default if name in ("sqnr_db", "cosine") else value > default
