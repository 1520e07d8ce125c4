"""Proves an artifact again from its folder alone: no model code, no loader. With a GPU, `built` becomes `validated`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trtforge.converter.artifact import PROOF, Artifact, open_artifact
from trtforge.converter.package import device_entry, measured_facts, publish_proved
from trtforge.converter.progress import Stages
from trtforge.converter.prove import Bench, prove_engine, prove_onnx
from trtforge.converter.reporting import read_report
from trtforge.runtime.device import device_facts
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.graph import OnnxModel, describe_model, load_graph
from trtforge.runtime.publish import staging_folder
from trtforge.runtime.trt.backend import Backend, find_backend
from trtforge.runtime.trt.load import check_fit
from trtforge.runtime.trt.options import LoadOptions
from trtforge.runtime.trt.plugins import match_plugins
from trtforge.validation.golden import GoldenSet
from trtforge.validation.parity import ParityReport
from trtforge.validation.proof import Proof
from trtforge.validation.tolerance import EXPORT, Tolerance

__all__ = ["check_fits", "copy_files", "prove_again", "republish", "validate_artifact"]


def validate_artifact(
    path: Path, *, stages: Stages, output: Path | None = None, plugins: Sequence[Path] = ()
) -> Artifact:
    """Checks every file, then runs the golden set: on the engine where there is a GPU, else on onnxruntime.

    Args:
        path: An artifact.
        stages: Receives progress.
        output: Where the promoted artifact is published; None: in place of `path`.
        plugins: The libraries of native code that the engine was built with.

    Returns:
        The artifact, promoted to `validated` where its engine ran and passed; unchanged without a GPU.

    Raises:
        ArtifactError: altered, failed, or its engine fits neither this TensorRT nor this GPU.
        ParityError: it does not equal the model that it came from.
    """
    with stages.stage("check", "every file's SHA-256"):
        artifact = open_artifact(path)
        if artifact.status == "failed":
            raise ArtifactError(f"{path} failed its proof when it was made", fix=f"trtforge inspect {path}")
        golden = GoldenSet.load(path / PROOF)
    device = device_facts()
    with staging_folder((output or path).absolute().parent) as staging:
        bench = Bench(golden, path / PROOF, staging, stages)
        if artifact.engine is None or device is None:
            _prove_graphs(artifact, bench)
            if device is None and artifact.engine is not None:
                stages.note("no GPU here: the ONNX was proved again, the engine was not run")
            return _copy(artifact, staging, output)
        backend = check_fits(artifact, artifact.engine)
        with stages.stage("prove", "engine on the GPU"):
            model = describe_model(load_graph(artifact.model), artifact.model)
            libraries = match_plugins(artifact.plugin_libraries, plugins, artifact.engine)
            report = prove_again(artifact, model, artifact.engine, backend.name, bench, libraries)
        with stages.stage("package"):
            folder = staging / "artifact"
            copy_files(artifact, folder)
            return republish(artifact, folder, output or path, golden, report, {"device": device_entry(device)})


def check_fits(artifact: Artifact, engine: Path) -> Backend:
    """The installed TensorRT that the artifact's engine was built with.

    Raises:
        MissingDependencyError: it is not installed.
        ArtifactError: another version is, or this GPU is none that the engine runs on.
    """
    facts, built = artifact.facts["engine"], artifact.build_options
    backend = find_backend(facts["backend"])
    options = LoadOptions(built.version_compatible, built.hardware_compatibility)
    check_fit(engine, backend, version=facts["version"], device=artifact.facts.get("device"), options=options)
    return backend


def _prove_graphs(artifact: Artifact, bench: Bench) -> None:
    used = set(artifact.facts["used_precisions"])
    tolerance = Tolerance.from_json(artifact.facts["tolerance"] or EXPORT.to_json())
    for path, stage in ((artifact.reference, "export"), (artifact.model, "precision")):
        if stage == "precision" and path == artifact.reference:
            continue
        with bench.stages.stage("prove", f"onnxruntime, {path.name}"):
            graph = load_graph(path)
            model = describe_model(graph, path)
            known = artifact.facts["graphs"]["reference" if stage == "export" else "model"]
            if model.hash != known:
                raise ArtifactError(f"{path} is graph {model.hash[:12]}, the manifest says {known[:12]}")
            old = read_report(artifact.path).proof.stage("export" if stage == "export" else "precision")
            assert old is not None
            report = prove_onnx(
                model,
                bench,
                stage="export" if stage == "export" else "precision",
                precision="fp32" if stage == "export" else artifact.facts["precision"],
                used={"fp32"} if stage == "export" else used,
                tolerance=old.tolerance if stage == "export" else tolerance,
            )
            report.raise_unless_passed()


def prove_again(
    artifact: Artifact, model: OnnxModel, engine: Path, backend: str, bench: Bench, plugins: Sequence[Path] = ()
) -> ParityReport:
    """Runs an engine of an artifact's model on the GPU, under the artifact's own tolerance.

    Raises:
        ArtifactError: it does not load here.
        ParityError: it crashed, or does not equal the model.
    """
    report = prove_engine(
        engine,
        backend,
        bench,
        graph=model.hash,
        inputs=model.inputs,
        outputs=model.outputs,
        precision=artifact.facts["precision"],
        tolerance=Tolerance.from_json(artifact.facts["tolerance"]),
        tf32=artifact.plan.float_default == "tf32",
        version_compatible=artifact.build_options.version_compatible,
        plugins=plugins,
    )
    report.raise_unless_passed()
    return report


def republish(
    artifact: Artifact,
    folder: Path,
    target: Path,
    golden: GoldenSet,
    ran: ParityReport | None,
    changed: Mapping[str, Any],
) -> Artifact:
    """Publishes an artifact anew, with what its engine did this time instead of earlier.

    Args:
        artifact: As it was.
        folder: Holds its files, with the engine of now.
        target: Where it goes.
        golden: Its golden set.
        ran: The engine's report; None: it has not run.
        changed: Entries of the manifest that are others now.

    Raises:
        ParityError: as `publish_proved`.
    """
    old = read_report(artifact.path).proof
    kept = tuple(found for found in old.reports if found.candidate.stage != "engine")
    proof = Proof((*kept, ran) if ran else kept, old.required, old.notes)
    drop = ("schema", "status", "name", "files")
    facts = {key: value for key, value in artifact.facts.items() if key not in drop}
    facts |= {**changed, "measured": measured_facts(proof)}
    return publish_proved(folder, target, artifact.name, facts, proof, golden)


def _copy(artifact: Artifact, staging: Path, output: Path | None) -> Artifact:
    if output is None:
        return artifact
    from trtforge.runtime.publish import publish_folder

    folder = staging / "artifact"
    shutil.copytree(artifact.path, folder)
    publish_folder(folder, output)
    return open_artifact(output)


def copy_files(artifact: Artifact, folder: Path, *, but: str = "") -> None:
    """Copies what the manifest lists, `but` one file, into a folder."""
    for name in artifact.manifest.files:
        if name == but:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.path / name, folder / name)
