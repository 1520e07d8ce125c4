"""Says why an export failed, deepest cause first, in the user's names and at the user's line."""

from __future__ import annotations

from typing import Any

import torch

from trtforge.converter.signature import ExampleInputs
from trtforge.runtime.errors import ExportError

__all__ = ["explain_capture", "explain_translation", "frozen_dimension"]


def explain_capture(error: Exception, module: torch.nn.Module, example: ExampleInputs) -> ExportError:
    return ExportError(f"torch.export cannot capture the model: {deepest(error)}")


def explain_translation(error: Exception, program: Any) -> ExportError:
    return ExportError(f"torch.onnx cannot translate the model: {deepest(error)}")


def frozen_dimension(dim: str, size: int, input_name: str, axis: int) -> ExportError:
    return ExportError(
        f"dimension {dim!r} (axis {axis} of input {input_name!r}) froze at {size}",
        why="the model's code depends on that size",
        fix=f"make the code independent of it, or write {size} in place of {dim!r}",
    )


def deepest(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
