"""`trtforge build DIR`: an artifact's engine, built on this machine. Needs neither torch nor the model's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import onnx_ir as ir

from trtforge.converter.artifact import ENGINE, PROOF, Artifact, open_artifact
from trtforge.converter.package import device_entry, engine_facts
from trtforge.converter.profiles import engine_profiles, engine_values
from trtforge.converter.progress import Stages
from trtforge.converter.prove import Bench
from trtforge.converter.quantize import halved_products
from trtforge.converter.revalidate import copy_files, prove_again, republish
from trtforge.converter.types import infer_types
from trtforge.runtime.device import DeviceFacts, device_facts
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.graph import OnnxModel, describe_model, load_graph
from trtforge.runtime.publish import staging_folder
from trtforge.runtime.trt.backend import Backend, find_backend
from trtforge.runtime.trt.build import BuildRequest, BuiltEngine, build_engine
from trtforge.runtime.trt.plugins import PluginLibrary, check_plugins
from trtforge.validation.golden import GoldenSet

__all__ = ["build_artifact"]


def build_artifact(
    path: Path,
    *,
    stages: Stages,
    output: Path | None = None,
    backend: str | None = None,
    plugins: Sequence[Path] = (),
) -> Artifact:
    """Builds an engine from an artifact's proved ONNX, proves it where a GPU runs it, and publishes the artifact anew.

    Args:
        path: An artifact: `portable`, or with an engine of another release or GPU, which is replaced.
        stages: Receives progress.
        output: Where the new artifact is published; None: in place of `path`.
        backend: "auto", "tensorrt" or "tensorrt-rtx"; None: what the artifact was made for.
        plugins: The libraries of native code that the artifact names, built for this TensorRT, in any order.

    Returns:
        The artifact: `validated` where the engine ran and passed, else `built`.

    Raises:
        MissingDependencyError: the backend is not installed.
        ArtifactError: altered or failed; the backend builds only on a GPU and there is none; or the graph holds what it
            gets wrong.
        BuildError: it cannot be built.
        ParityError: the engine does not equal the model; the artifact at `path` stays as it was.
    """
    with stages.stage("check", "every file's SHA-256"):
        artifact = open_artifact(path)
        if artifact.status == "failed":
            raise ArtifactError(f"{path} failed its proof and is never built", fix=f"trtforge bisect {path}")
        if network := artifact.facts["source"].get("network"):
            raise ArtifactError(
                f"the engine of {path} was built from the network of {network}, which the artifact does not hold",
                fix="convert the model again on this machine",
            )
        golden = GoldenSet.load(path / PROOF)
        graph = load_graph(artifact.model)
        model = describe_model(graph, artifact.model)
    device = device_facts()
    found = find_backend(backend or artifact.facts["target"]["backend"])
    _check_machine(artifact, found, device)
    _check_products(artifact, graph, found)
    libraries = _find_plugins(artifact, plugins)
    target = output or path
    with staging_folder(target.absolute().parent) as staging:
        folder, work = staging / "artifact", staging / "work"
        work.mkdir()
        copy_files(artifact, folder, but=ENGINE)
        with stages.stage("build", str(found)):
            built = _build(artifact, model, found, folder / ENGINE, libraries, stages)
        ran = None
        if device is not None and found.capabilities.runs_on(device.compute_capability):
            with stages.stage("prove", "engine on the GPU"):
                bench = Bench(golden, path / PROOF, work, stages)
                ran = prove_again(artifact, model, built.path, built.backend, bench, libraries)
        changed = {
            "engine": engine_facts(built, tf32=_tf32(artifact)),
            "device": device_entry(device) if device is not None and ran is not None else None,
        }
        if libraries:
            hashed = [asdict(PluginLibrary.of_file(library)) for library in libraries]
            changed["target"] = {**artifact.facts["target"], "plugin_libraries": hashed}
        with stages.stage("package"):
            return republish(artifact, folder, target, golden, ran, changed)


def _tf32(artifact: Artifact) -> bool:
    return artifact.plan.float_default == "tf32"


def _build(
    artifact: Artifact, model: OnnxModel, backend: Backend, engine: Path, plugins: tuple[Path, ...], stages: Stages
) -> BuiltEngine:
    wanted = artifact.facts["target"]
    request = BuildRequest(
        onnx=model.path,
        engine=engine,
        backend=backend.name,
        profiles=engine_profiles(artifact.inputs, artifact.profiles),
        values=engine_values(artifact.inputs, artifact.profiles),
        tf32=_tf32(artifact),
        compute_capabilities=tuple(wanted["compute_capabilities"]),
        # The cache's path is the other machine's: an artifact from elsewhere must not say where to write here.
        options=replace(artifact.build_options, timing_cache=None, plugins=plugins),
    )
    return build_engine(request, on_event=stages.forward)


def _check_machine(artifact: Artifact, backend: Backend, device: DeviceFacts | None) -> None:
    if backend.capabilities.needs_gpu_to_build and device is None:
        raise ArtifactError(
            f"{backend} builds {artifact.path.name} on the GPU that it shall run on, and there is none here",
            fix="run this on the target, or give --backend tensorrt-rtx, which builds ahead of time",
        )


def _find_plugins(artifact: Artifact, given: Sequence[Path]) -> tuple[Path, ...]:
    """The given libraries in the artifact's order: by name, since another release needs another build of them."""
    check_plugins(given)
    found = {path.name: path for path in given}
    needed = [library.name for library in artifact.plugin_libraries]
    if set(needed) != set(found):
        raise ArtifactError(
            f"{artifact.path} needs the plugin libraries {', '.join(needed) or '(none)'}, "
            f"{', '.join(found) or 'none'} are given",
            why="they hold operators of its ONNX",
            fix="give each of them as --plugin FILE, built for the TensorRT that is installed here",
        )
    return tuple(found[name] for name in needed)


def _check_products(artifact: Artifact, graph: ir.Model, backend: Backend) -> None:
    if backend.capabilities.half_quantized_products:
        return
    infer_types(graph)
    if halved := halved_products(graph):
        raise ArtifactError(
            f"{len(halved)} quantized products of {artifact.model.name} compute in float16: {', '.join(halved[:3])}",
            why=f"{backend} sums their codes in float16, past its range",
            fix="convert the model again with this backend as its target",
        )
