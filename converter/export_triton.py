"""`trtforge export-triton`: a proved artifact as a model of a Triton model repository."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtforge.converter.artifact import ENGINE, PROOF, Artifact, open_artifact
from trtforge.converter.progress import Stages
from trtforge.converter.triton_config import TritonModel, find_batch_dim, render_config
from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.publish import hash_file, publish_folder, scratch_folder, staging_folder

__all__ = ["Exported", "export_triton"]

CONFIG = "config.pbtxt"
_HEADER = "# Written by trtforge export-triton; a file without this line is never replaced.\n"
_SOURCE = "trtforge.sha256"
_ROWS_SQNR_DB = 20.0
"""Rows alone against rows in a batch, both in onnxruntime on one graph: rounding leaves 40 dB and more in half
precision; a row that looks at the others leaves none."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A model in a repository.

    Attributes:
        path: Its folder.
        version: The version's number, and its folder's name.
        added: False where that version held the very same model already.
        model: What its configuration says.
        note: Why requests are not batched, where they are not; else empty.
    """

    path: Path
    version: int
    added: bool
    model: TritonModel
    note: str

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "model": self.model.name,
            "path": str(self.path),
            "version": self.version,
            "added": self.added,
            "backend": self.model.backend,
            "batch": self.model.batch,
            "note": self.note,
        }


def export_triton(
    path: Path,
    repository: Path,
    *,
    stages: Stages,
    name: str | None = None,
    onnx: bool = False,
    allow_unvalidated: bool = False,
) -> Exported:
    """Writes an artifact into a model repository as the next version of its model, as one step.

    Args:
        path: An artifact; every byte of it is checked first.
        repository: The repository's folder; made where it is not there.
        stages: Receives progress.
        name: The model's name there; None: the artifact's.
        onnx: Export the proved ONNX, for Triton's onnxruntime backend, instead of the engine.
        allow_unvalidated: Export an engine that has never run, too.

    Returns:
        Where it is. The same model again is no new version.

    Raises:
        ConfigError: `name` is no name of a folder.
        ArtifactError: altered; failed, not validated, or without an engine; an engine of TensorRT-RTX, which Triton
            does not load; or the repository holds a model of that name that trtforge did not write, or one with other
            inputs and outputs.
    """
    with stages.stage("check", "every file's SHA-256"):
        artifact = open_artifact(path)
        source = _proved_onnx(artifact) if onnx else _loadable_engine(artifact, allow_unvalidated)
    wanted = artifact.name if name is None else name
    if not re.fullmatch(r"[\w][\w.+-]*", wanted):
        raise ConfigError(
            f"{wanted!r} cannot be a model's name in Triton",
            why="it is a folder's name and a part of URLs",
            fix="give --name of letters, digits, '_', '-' and '.'",
        )
    with stages.stage("batching"):
        batch, note = _batch_dim(artifact)
    model = TritonModel(
        name=wanted,
        backend="onnxruntime" if onnx else "tensorrt",
        file="model.onnx" if onnx else "model.plan",
        inputs=artifact.inputs,
        outputs=artifact.outputs,
        profiles=artifact.profiles,
        batch=batch,
        parameters={
            _SOURCE: hash_file(source),
            "trtforge.status": artifact.status,
            "trtforge.precision": str(artifact.facts.get("precision", "")),
        },
    )
    with stages.stage("package"):
        version, added = _publish(artifact, source, model, repository / wanted)
    return Exported(repository / wanted, version, added, model, note)


def _loadable_engine(artifact: Artifact, allow_unvalidated: bool) -> Path:
    _refuse_failed(artifact)
    if artifact.engine is None:
        raise ArtifactError(
            f"{artifact.path} is {artifact.status}: it holds no engine",
            fix=f"trtforge build {artifact.path}, on the GPU that it shall run on, or export-triton --onnx",
        )
    backend = artifact.facts["engine"]["backend"]
    if backend != "tensorrt":
        raise ArtifactError(
            f"the engine of {artifact.path} is of {backend}, which Triton does not load",
            why="Triton's TensorRT backend loads plans of the full TensorRT alone",
            fix=f"trtforge build {artifact.path} --backend tensorrt on the target, or export-triton --onnx, which "
            "takes the proved ONNX for Triton's onnxruntime backend",
        )
    if artifact.status != "validated" and not allow_unvalidated:
        raise ArtifactError(
            f"{artifact.path} is {artifact.status}: its engine has never run",
            fix=f"trtforge validate {artifact.path} on the target, or export-triton --allow-unvalidated",
        )
    return artifact.engine


def _proved_onnx(artifact: Artifact) -> Path:
    _refuse_failed(artifact)  # any other status says that the ONNX is proved
    return artifact.model


def _refuse_failed(artifact: Artifact) -> None:
    if artifact.status == "failed":
        raise ArtifactError(
            f"{artifact.path} failed its proof and is never exported", fix=f"trtforge bisect {artifact.path}"
        )


def _batch_dim(artifact: Artifact) -> tuple[str | None, str]:
    """The dimension along which Triton may join requests, and why there is none.

    A first dimension may be a sequence, whose rows look at each other: joining requests would then give wrong answers
    in silence. So the rows of a golden sample are run alone.
    """
    name = find_batch_dim(artifact.inputs, artifact.outputs, artifact.profiles)
    if name is None:
        return None, (
            "requests are not batched: no dynamic dimension from 1 on is the first of every input and output, "
            "and that alone"
        )
    apart = _row_difference(artifact, name)
    if apart is None:
        return None, f"requests are not batched: no sample of the proof has two rows along {name!r} to compare"
    if apart < _ROWS_SQNR_DB:
        return None, (
            f"requests are not batched: rows along {name!r} depend on each other "
            f"({apart:.1f} dB between a row alone and in its batch)"
        )
    return name, ""


def _row_difference(artifact: Artifact, batch: str) -> float | None:
    """Least SQNR, in dB, between the first row's outputs alone and in a batch, of all outputs; None without a batch."""
    import numpy as np

    from trtforge.runtime.onnx_runner import run_onnx
    from trtforge.runtime.tensors import save_tensors
    from trtforge.validation.golden import GoldenSet, load_outputs

    golden = GoldenSet.load(artifact.path / PROOF)
    sample = next((s for s in golden.samples if s.sizes.get(batch, 1) > 1), None)
    if sample is None:
        return None
    feeds = {f"all/{key}": array for key, array in sample.inputs.items()}
    feeds |= {f"one/{key}": np.ascontiguousarray(array[:1]) for key, array in sample.inputs.items()}
    with scratch_folder() as work:
        given, got = work / "rows.safetensors", work / "outputs.safetensors"
        save_tensors(given, feeds, {})
        run_onnx(artifact.reference, given, got, disable_quant_qdq=True)
        results = load_outputs(got)
    least = float("inf")
    for key, together in results["all"].items():
        alone, row = results["one"][key].astype(np.float64), together[:1].astype(np.float64)
        noise, signal = float(np.sum((alone - row) ** 2)), float(np.sum(row**2))
        if noise:
            least = min(least, 10 * float(np.log10(signal / noise)) if signal else -np.inf)
    return least


def _publish(artifact: Artifact, source: Path, model: TritonModel, target: Path) -> tuple[int, bool]:
    # Staged inside the repository, since publishing is a rename on one file system. A server that polls may see the
    # staging folder for that moment, as a model without a configuration.
    with staging_folder(target.absolute().parent) as staging:
        text = _HEADER + render_config(model)
        last = _last_version(target, text)
        latest = target / str(last) / model.file
        if last and latest.is_file() and hash_file(latest) == model.parameters[_SOURCE]:
            return last, False
        folder = staging / "model"
        folder.mkdir()
        _keep_versions(target, folder)
        version = folder / str(last + 1)
        version.mkdir()
        shutil.copyfile(source, version / model.file)
        if source.name != ENGINE:
            for beside in artifact.path.glob(f"{source.name}.*"):  # external data, under the name that the ONNX says
                shutil.copyfile(beside, version / beside.name)
        if hash_file(version / model.file) != model.parameters[_SOURCE]:
            raise ArtifactError(f"{source} was altered while it was copied", fix="run this again")
        (folder / CONFIG).write_text(text, encoding="ascii")
        publish_folder(folder, target)
    return last + 1, True


def _last_version(target: Path, text: str) -> int:
    """The highest version in the model's folder; 0 where there is no folder."""
    if not target.exists() and not target.is_symlink():
        return 0
    try:
        there = (target / CONFIG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        there = ""
    if target.is_symlink() or not there.startswith(_HEADER):
        raise ArtifactError(
            f"{target} was not written by trtforge, and is not replaced", fix="give another --name, or remove it"
        )
    if _interface(there) != _interface(text):
        raise ArtifactError(
            f"the model in {target} has another configuration than this artifact would have",
            why="one config.pbtxt holds for all versions of a model, and clients rely on its inputs and outputs",
            fix="give another --name, or remove the folder",
        )
    return max((int(path.name) for path in target.iterdir() if path.name.isdecimal()), default=0)


def _interface(text: str) -> str:
    return text.partition("parameters {")[0]


def _keep_versions(target: Path, folder: Path) -> None:
    """Everything of the published folder but its configuration, as links where the file system has them."""
    if target.is_dir():
        for path in sorted(target.iterdir()):
            if path.name == CONFIG:
                continue
            if path.is_dir():
                shutil.copytree(path, folder / path.name, copy_function=_link, symlinks=True)
            else:
                _link(str(path), str(folder / path.name))


def _link(source: str, target: str) -> str:
    with contextlib.suppress(OSError):
        os.link(source, target, follow_symlinks=False)
        return target
    return str(shutil.copy2(source, target))
