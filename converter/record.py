"""What of an artifact is compared with another one's: figures, limits, hashes, versions; as a baseline keeps it."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtforge.converter.artifact import PLAN, PROOF, REFERENCE, Artifact
from trtforge.runtime.errors import ArtifactError

if TYPE_CHECKING:
    from trtforge.validation.metrics import Measures

__all__ = ["ArtifactRecord", "Figures", "StageRecord", "record_artifact"]

_HASH_DIGITS = 16
"""Enough to tell two models apart, and short enough for a person to compare in a diff."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One output over all samples of the golden set, as in `validation.metrics.Measures`.

    A floating output has the first three, an integer or boolean one `mismatch` alone: what the proof judges it by.
    """

    sqnr_db: float | None = None
    cosine: float | None = None
    max_abs_over_std: float | None = None
    mismatch: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Rounded to what a person can use, so that a diff shows changes and not digits; infinities as text."""
        rounded = {
            "sqnr_db": None if self.sqnr_db is None else round(self.sqnr_db, 1),
            "cosine": None if self.cosine is None else round(self.cosine, 6),
            "max_abs_over_std": None if self.max_abs_over_std is None else float(f"{self.max_abs_over_std:.3g}"),
            "mismatch": None if self.mismatch is None else float(f"{self.mismatch:.3g}"),
        }
        return {
            name: value if math.isfinite(value) else str(value) for name, value in rounded.items() if value is not None
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Figures:
        """The inverse of `to_json`, as rounded."""
        return cls(**{name: float(value) for name, value in data.items()})


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One comparison with PyTorch: what ran ("onnxruntime 1.32.0"), its verdict, and each output's figures."""

    runner: str
    verdict: str
    outputs: Mapping[str, Figures]


@dataclass(frozen=True, slots=True)
class ArtifactRecord:
    """Everything of an artifact that a comparison looks at.

    Attributes:
        precision: The plan's default.
        plan: Its rules, one sentence each.
        proof: By stage, in the order "export", "precision", "engine".
        tolerance: The limits that the proof was held to; None means not asked.
        hashes: The first 16 hex digits of SHA-256: "structure" (the float graph without the values of its weights),
            "weights" (the same graph with them), "checkpoint", "inputs" (of the golden set), "calibration" (its data).
        operators: How many of each the float graph has.
        versions: Of what could change the result; TensorRT's under the backend's name.
        device: The GPU that the engine ran on, or "".
        sizes: Bytes of engine and ONNX.
    """

    precision: str
    plan: tuple[str, ...] = ()
    proof: Mapping[str, StageRecord] = field(default_factory=dict)
    tolerance: Mapping[str, float | None] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    operators: Mapping[str, int] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    sizes: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-able, in a fixed order, rounded."""
        return {
            "precision": self.precision,
            "plan": list(self.plan),
            "proof": {
                stage: {
                    "runner": found.runner,
                    "verdict": found.verdict,
                    "outputs": {name: figures.to_json() for name, figures in found.outputs.items()},
                }
                for stage, found in self.proof.items()
            },
            "tolerance": dict(self.tolerance),
            "hashes": dict(self.hashes),
            "operators": dict(sorted(self.operators.items())),
            "versions": dict(sorted(self.versions.items())),
            "device": self.device,
            "sizes": dict(sorted(self.sizes.items())),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArtifactRecord:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it was never written by `to_json`.
        """
        proof = {
            stage: StageRecord(
                str(found["runner"]),
                str(found["verdict"]),
                {name: Figures.from_json(figures) for name, figures in found["outputs"].items()},
            )
            for stage, found in data["proof"].items()
        }
        return cls(
            precision=str(data["precision"]),
            plan=tuple(map(str, data["plan"])),
            proof=proof,
            tolerance={k: None if v is None else float(v) for k, v in data["tolerance"].items()},
            hashes={k: str(v) for k, v in data["hashes"].items()},
            operators={k: int(v) for k, v in data["operators"].items()},
            versions={k: str(v) for k, v in data["versions"].items()},
            device=str(data["device"]),
            sizes={k: int(v) for k, v in data["sizes"].items()},
        )


def record_artifact(artifact: Artifact) -> ArtifactRecord:
    """What a comparison looks at, of an artifact of any status.

    Raises:
        ArtifactError: its report is missing or damaged.
    """
    facts = artifact.facts
    plan = artifact.plan if (artifact.path / PLAN).exists() else None
    structure, operators = _structure(artifact)
    engine = facts.get("engine")
    versions = {str(k): str(v) for k, v in facts["versions"].items()}
    if engine:
        versions[str(engine["backend"])] = str(engine["version"])
    device = facts.get("device")
    calibration = facts.get("calibration") or {}
    hashes = {
        "structure": structure,
        "weights": str(facts["graphs"]["reference"]),
        "checkpoint": str(facts["source"].get("checkpoint_sha256") or ""),
        "inputs": _inputs_hash(artifact),
        "calibration": str(calibration.get("data") or ""),
    }
    return ArtifactRecord(
        precision=str(facts["precision"]),
        plan=() if plan is None else tuple(rule.describe() for rule in plan.rules),
        proof=_proof(artifact),
        tolerance=dict(facts.get("tolerance") or {}),
        hashes={name: value[:_HASH_DIGITS] for name, value in hashes.items() if value},
        operators=operators,
        versions=versions,
        device=f"{device['name']} ({device['compute_capability']})" if device else "",
        sizes={
            name: entry.size
            for name, entry in artifact.manifest.files.items()
            if name.endswith((".onnx", ".onnx.data", ".engine"))
        },
    )


def _proof(artifact: Artifact) -> dict[str, StageRecord]:
    from trtforge.converter.reporting import read_report

    found = {}
    proof = read_report(artifact.path).proof
    for stage in ("export", "precision", "engine"):
        report = next((report for report in proof.reports if report.candidate.stage == stage), None)
        if report is None:
            continue
        outputs = {output.name: _figures(output.dtype, output.pooled) for output in report.outputs if output.pooled}
        runner = f"{report.candidate.runner} {report.candidate.version}"
        found[stage] = StageRecord(runner, report.verdict.value, outputs)
    return found


def _figures(dtype: str, measures: Measures) -> Figures:
    if "float" not in dtype:
        return Figures(mismatch=measures.mismatch)
    return Figures(measures.sqnr_db, measures.cosine, measures.max_abs_over_std)


def _structure(artifact: Artifact) -> tuple[str, dict[str, int]]:
    from trtforge.runtime.graph import all_graphs, graph_hash, load_graph

    if not (artifact.path / REFERENCE).exists():
        raise ArtifactError(f"{artifact.path} has no {REFERENCE}", fix="convert again")
    graph = load_graph(artifact.reference)
    return graph_hash(graph, weights=False), Counter(node.op_type for part in all_graphs(graph) for node in part)


def _inputs_hash(artifact: Artifact) -> str:
    """Of the golden inputs' names and bytes alone: the file's metadata also names torch's version."""
    import numpy as np

    from trtforge.runtime.tensors import load_tensors
    from trtforge.validation.golden import INPUTS_FILE

    arrays, _ = load_tensors(artifact.path / PROOF / INPUTS_FILE)
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
