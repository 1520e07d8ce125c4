"""trtforge: PyTorch models to TensorRT engines, each with the proof that it equals the model it came from.

    import trtforge
    artifact = trtforge.convert(model, example_inputs, "artifacts/resnet18", precision="fp16",
                                dims={"batch": (1, 8, 32)}, inputs={"x": ("batch", 3, 224, 224)})
    engine = artifact.load()          # on a machine with a GPU
    y = engine(x)

Importing this loads neither torch nor TensorRT, nor onnxruntime: every name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtforge.converter.api import convert, load
    from trtforge.converter.artifact import Artifact, open_artifact
    from trtforge.runtime.errors import (
        AccuracyError,
        ArtifactError,
        BuildError,
        CalibrationError,
        ConfigError,
        ExportError,
        MissingDependencyError,
        ParityError,
        TrtForgeError,
    )
    from trtforge.runtime.precision import PrecisionPlan, Rule

__version__ = "0.1.0"

__all__ = [
    "AccuracyError",
    "Artifact",
    "ArtifactError",
    "BuildError",
    "CalibrationError",
    "ConfigError",
    "ExportError",
    "MissingDependencyError",
    "ParityError",
    "PrecisionPlan",
    "Rule",
    "TrtForgeError",
    "convert",
    "load",
    "open_artifact",
]

_HOMES = {
    "convert": "trtforge.converter.api",
    "load": "trtforge.converter.api",
    "Artifact": "trtforge.converter.artifact",
    "open_artifact": "trtforge.converter.artifact",
    "PrecisionPlan": "trtforge.runtime.precision",
    "Rule": "trtforge.runtime.precision",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trtforge' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "trtforge.runtime.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
