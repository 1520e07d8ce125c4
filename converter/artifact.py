"""An artifact as its reader sees it: checked against its manifest, and loadable where it fits this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtforge.converter.manifest import Manifest, Status, read_manifest
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.precision import PrecisionPlan
from trtforge.runtime.specs import DimRange, InputSpec, Profile, TensorSpec, ValueRange
from trtforge.runtime.trt.options import BuildOptions, LoadOptions
from trtforge.runtime.trt.plugins import PluginLibrary, match_plugins

if TYPE_CHECKING:
    from trtforge.runtime.engine import Engine

__all__ = ["ENGINE", "FAILED_SUFFIX", "MODEL", "PLAN", "PROOF", "REFERENCE", "REPORT", "Artifact", "open_artifact"]

REFERENCE = "reference.onnx"
MODEL = "model.onnx"
ENGINE = "model.engine"
PLAN = "precision.yaml"
REPORT = "report.json"
PROOF = "proof"
FAILED_SUFFIX = ".failed"
"""A run that failed leaves `NAME.failed/`, which `load` always refuses."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A folder whose every byte was checked when it was opened."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.name

    @property
    def status(self) -> Status:
        """`validated`: this engine ran on a GPU and passed. `built`: the ONNX is proved, the engine has not run.
        `portable`: the ONNX is proved, no engine. `failed`: kept to find out why.
        """
        return self.manifest.status

    @property
    def facts(self) -> Mapping[str, Any]:
        """The manifest as written."""
        return self.manifest.facts

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """Inputs in order, with the values that may be generated for them."""
        return tuple(_read_input(data) for data in self.facts["inputs"])

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs in order."""
        return tuple(TensorSpec.from_json(data) for data in self.facts["outputs"])

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """Optimization profiles."""
        return tuple({name: DimRange(*sizes) for name, sizes in profile.items()} for profile in self.facts["profiles"])

    @property
    def plan(self) -> PrecisionPlan:
        """The precision plan that was carried out."""
        return PrecisionPlan.load(self.path / PLAN)

    @property
    def build_options(self) -> BuildOptions:
        """The builder's switches that the engine was built with, or is to be."""
        return BuildOptions.from_json(self.facts["target"])

    @property
    def plugin_libraries(self) -> tuple[PluginLibrary, ...]:
        """The libraries of native code that the engine was built with, and needs to load."""
        return tuple(PluginLibrary(**entry) for entry in self.facts["target"].get("plugin_libraries", ()))

    @property
    def reference(self) -> Path:
        """The float graph."""
        return self.path / REFERENCE

    @property
    def model(self) -> Path:
        """The graph with the plan carried out; the reference where they are equal."""
        return self.path / (MODEL if MODEL in self.manifest.files else REFERENCE)

    @property
    def engine(self) -> Path | None:
        """TensorRT's plan file, where there is one."""
        return self.path / ENGINE if ENGINE in self.manifest.files else None

    def load(
        self,
        *,
        allow_unvalidated: bool = False,
        weight_budget_mib: int | None = None,
        contexts: int = 4,
        graphs: int = 32,
        plugins: Sequence[Path | str] = (),
    ) -> Engine:
        """The engine, ready to be called with torch tensors on the GPU.

        Args:
            allow_unvalidated: Load a `built` engine, which has never run, too.
            weight_budget_mib: How much of the weights may stay on the GPU, MiB, where the engine was built with
                `weight_streaming`; None: all of them.
            contexts: How many execution contexts each profile may have; each takes the engine's scratch memory.
            graphs: How many CUDA graphs each context keeps; 0 for none.
            plugins: The libraries of native code that it was built with; it is loaded with no others.

        Raises:
            ArtifactError: failed, not validated, without an engine, altered since it was opened, or made for another
                TensorRT or GPU.
            ConfigError: a budget for weights that were not built to stream.
        """
        if self.status == "failed":
            raise ArtifactError(
                f"{self.path} failed its proof and is never loaded", fix=f"trtforge inspect {self.path}"
            )
        if self.engine is None:
            raise ArtifactError(
                f"{self.path} is {self.status}: it holds no engine",
                fix=f"trtforge build {self.path}, on the GPU that it shall run on",
            )
        if self.status != "validated" and not allow_unvalidated:
            raise ArtifactError(
                f"{self.path} is {self.status}: its engine has never run",
                fix=f"trtforge validate {self.path} on a machine with a GPU, or load(allow_unvalidated=True)",
            )
        libraries = match_plugins(self.plugin_libraries, [Path(path) for path in plugins], self.engine)
        from trtforge.runtime.engine import Engine

        read_manifest(self.path, known=self.manifest)
        facts, built = self.facts["engine"], self.build_options
        options = LoadOptions(built.version_compatible, built.hardware_compatibility, weight_budget_mib, libraries)
        return Engine(
            self.engine,
            backend=facts["backend"],
            version=facts["version"],
            device=self.facts.get("device"),
            digest=self.manifest.files[ENGINE].sha256,
            tf32=facts["tf32"],
            options=options,
            contexts=contexts,
            graphs=graphs,
        )


def open_artifact(path: Path | str) -> Artifact:
    """Opens an artifact's folder and checks every file in it.

    Raises:
        ArtifactError: not an artifact, or altered.
    """
    folder = Path(path)
    return Artifact(folder, read_manifest(folder))


def input_facts(spec: InputSpec) -> dict[str, Any]:
    """An input as the manifest holds it."""
    data = spec.to_json()
    if spec.elements:
        data["elements"] = list(spec.elements)
    return data if spec.values is None else {**data, "values": [spec.values.min, spec.values.max]}


def _read_input(data: Mapping[str, Any]) -> InputSpec:
    values = data.get("values")
    spec = TensorSpec.from_json(data)
    elements = tuple(data.get("elements", ()))
    return InputSpec(spec.name, spec.dtype, spec.shape, ValueRange(*values) if values else None, elements)
