"""Every error that trtforge raises on purpose.

    TrtForgeError                  exit code
    ├── ConfigError                2   what the user wrote cannot be right
    ├── MissingDependencyError     3   a library that this step needs is not installed
    ├── ExportError                3   PyTorch or ONNX could not express the model
    ├── CalibrationError           3   the calibration data or its ranges are unusable
    ├── BuildError                 3   TensorRT could not parse or build the network
    ├── ParityError                4   the candidate does not equal the reference, or nothing was proved
    │   └── AccuracyError          4   it does not keep its accuracy budget, or is not shown to
    └── ArtifactError              5   an artifact is corrupt, foreign, or does not fit this machine

Anything else that escapes is a bug (exit code 1) and shows its traceback.
"""

from __future__ import annotations

__all__ = [
    "AccuracyError",
    "ArtifactError",
    "BuildError",
    "CalibrationError",
    "ConfigError",
    "ExportError",
    "MissingDependencyError",
    "ParityError",
    "TrtForgeError",
]


class TrtForgeError(Exception):
    """Says what went wrong (with the values), why, and what to do.

    Args:
        what: The fact, with the offending values in it.
        why: The cause, where `what` alone does not tell it.
        fix: What the user should do next, as an instruction.
    """

    exit_code: int = 1
    """Of the command that ends with this error: the class's, unless the error knows better."""

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix
        self.stage = ""
        """The pipeline stage it was raised in; set by the pipeline."""

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class ConfigError(TrtForgeError):
    """The configuration, a plan, a rule or an argument is wrong."""

    exit_code = 2


class MissingDependencyError(TrtForgeError):
    """A library that this step needs is not installed; `fix` holds the pip line."""

    exit_code = 3


class ExportError(TrtForgeError):
    """The model could not be exported to, or expressed in, ONNX."""

    exit_code = 3


class CalibrationError(TrtForgeError):
    """Calibration could not produce usable ranges."""

    exit_code = 3


class BuildError(TrtForgeError):
    """TensorRT could not parse the ONNX or build an engine from it."""

    exit_code = 3


class ParityError(TrtForgeError):
    """The candidate differs from the reference, or the comparison proves nothing."""

    exit_code = 4


class AccuracyError(ParityError):
    """The candidate does not keep its accuracy budget, or the samples are too few to show that it does."""


class ArtifactError(TrtForgeError):
    """An artifact is corrupt, incomplete, foreign, or does not fit this machine."""

    exit_code = 5
