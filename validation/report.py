"""What a report says, as data: `report.json`, which `report.html` is drawn from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trtforge.runtime.errors import ArtifactError
from trtforge.validation.golden import GoldenSet
from trtforge.validation.parity import ParityReport, Stage
from trtforge.validation.proof import Proof

__all__ = ["REPORT_SCHEMA", "PlanException", "ReportData", "SampleFacts", "sample_facts"]

REPORT_SCHEMA = 1

_OWN = frozenset(
    {"schema", "name", "status", "error", "verdict", "blame", "required", "notes", "reports", "exceptions", "samples",
     "commands"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlanException:
    """Nodes that run in another precision than the plan's default.

    Attributes:
        selector: What selects them, as the plan writes it: "module: encoder.*, op: MatMul".
        precision: What they run in.
        nodes: How many.
        origin: Who asked: "user", "overflow", "sensitivity", "accuracy", "type".
        reason: Why.
    """

    selector: str
    precision: str
    nodes: int
    origin: str
    reason: str


@dataclass(frozen=True, slots=True)
class SampleFacts:
    """One golden sample without its values; `seed` is None for real inputs."""

    name: str
    sizes: Mapping[str, int]
    seed: int | None
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        name: The model's name.
        status: The artifact's status: "validated", "built", "portable", "failed".
        proof: The comparisons.
        facts: JSON-able, as in the manifest. The page shows, each where it is present: "created", "precision",
            "used_precisions", "inputs" and "outputs" (lists of name, dtype, shape), "profiles" (maps of dimension to
            [min, opt, max]), "opset", "graphs" (hashes by name), "engine" (sha256, size, backend, version,
            compute_capabilities, warnings), "device" (name, compute_capability, sm_count), "source", "versions",
            "command" (that makes the artifact again). Others are kept in the JSON.
        exceptions: The plan's exceptions.
        samples: The golden samples.
        commands: Further shell lines by what they do: {"Compare with Polygraphy": "polygraphy run …"}.
        error: The error that ended the run, `{"what", "why", "fix"}`; None where there was none.
    """

    name: str
    status: str
    proof: Proof
    facts: Mapping[str, Any] = field(default_factory=dict)
    exceptions: tuple[PlanException, ...] = ()
    samples: tuple[SampleFacts, ...] = ()
    commands: Mapping[str, str] = field(default_factory=dict)
    error: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-able; the facts stand beside the report's own keys."""
        proof = self.proof
        return {
            "schema": REPORT_SCHEMA,
            "name": self.name,
            "status": self.status,
            "verdict": proof.verdict.value,
            "blame": proof.blame,
            "error": dict(self.error) if self.error is not None else None,
            "required": list(proof.required),
            "notes": list(proof.notes),
            "reports": [report.to_json() for report in proof.reports],
            "exceptions": [asdict(exception) for exception in self.exceptions],
            "samples": [
                {
                    "name": s.name,
                    "sizes": dict(s.sizes),
                    "seed": s.seed,
                    "shapes": {name: list(shape) for name, shape in s.shapes.items()},
                }
                for s in self.samples
            ],
            "commands": dict(self.commands),
            **{key: value for key, value in self.facts.items() if key not in _OWN},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ReportData:
        """The inverse of `to_json`.

        Raises:
            ArtifactError: another schema version, or damaged.
        """
        try:
            if data["schema"] != REPORT_SCHEMA:
                raise ArtifactError(
                    f"the report has schema {data['schema']!r}; this trtforge reads {REPORT_SCHEMA}",
                    fix="read it with the trtforge that wrote it, or validate again",
                )
            required: tuple[Stage, ...] = tuple(data["required"])
            reports = tuple(ParityReport.from_json(report) for report in data["reports"])
            return cls(
                name=data["name"],
                status=data["status"],
                proof=Proof(reports, required, tuple(data["notes"])),
                facts={key: value for key, value in data.items() if key not in _OWN},
                exceptions=tuple(PlanException(**exception) for exception in data["exceptions"]),
                samples=tuple(_read_sample(sample) for sample in data["samples"]),
                commands=dict(data["commands"]),
                error=data["error"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the report is damaged: {error!r}", fix="validate the artifact again") from error

    def save(self, path: Path) -> None:
        """Writes `report.json`. Raises `ArtifactError` where it cannot."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            path.write_text(text, encoding="utf-8", newline="\n")
        except OSError as error:
            raise ArtifactError(
                f"cannot write {path}: {error.strerror or error}",
                fix="free space or give permission there, or choose another --output",
            ) from error

    @classmethod
    def load(cls, path: Path) -> ReportData:
        """Reads `report.json`.

        Raises:
            ArtifactError: the file is missing, not JSON, of another schema version, or damaged.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"cannot read {path}: {error}", fix="validate the artifact again") from error
        if not isinstance(data, dict):
            raise ArtifactError(f"{path} is not a JSON object", fix="validate the artifact again")
        return cls.from_json(data)


def sample_facts(golden: GoldenSet) -> tuple[SampleFacts, ...]:
    """What a report shows of a golden set."""
    return tuple(
        SampleFacts(s.name, dict(s.sizes), s.seed, {name: array.shape for name, array in s.inputs.items()})
        for s in golden.samples
    )


def _read_sample(data: Mapping[str, Any]) -> SampleFacts:
    shapes = {name: tuple(shape) for name, shape in data["shapes"].items()}
    return SampleFacts(data["name"], dict(data["sizes"]), data["seed"], shapes)
