"""A foreign graph runs in a child process first: kernels of onnxruntime have ended processes, the caller's too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtforge.runtime.child import ChildCrashError
from trtforge.runtime.errors import ExportError
from trtforge.runtime.inputs import make_inputs
from trtforge.runtime.onnx_runner import run_onnx
from trtforge.runtime.specs import InputSpec, Profile
from trtforge.runtime.tensors import save_tensors
from trtforge.validation.golden import plan_points

__all__ = ["try_in_child"]


def try_in_child(path: Path, specs: Sequence[InputSpec], profiles: Sequence[Profile], folder: Path) -> None:
    """Runs the graph once on generated inputs, at the end of the profile where they are smallest.

    Args:
        path: The user's ONNX file.
        specs: Its inputs.
        profiles: Optimization profiles.
        folder: For files that are deleted again.

    Raises:
        ExportError: onnxruntime crashed, or refuses the graph.
        ParityError: it failed on these inputs.
    """
    point = next(point for point in plan_points(profiles) if point.required)
    feeds, outputs = folder / ".trial-inputs.safetensors", folder / ".trial-outputs.safetensors"
    try:
        arrays = make_inputs(specs, point.sizes, point.seed)
        save_tensors(feeds, {f"{point.name}/{name}": array for name, array in arrays.items()})
        run_onnx(path, feeds, outputs, disable_quant_qdq=True)
    except ChildCrashError as error:
        raise ExportError(
            f"onnxruntime crashed on {path} ({error.signal or 'it exited'})",
            why=f"{error.what}; {error.why}",
            fix="take the nodes out half by half until it runs, and report the rest to onnxruntime",
        ) from error
    finally:
        feeds.unlink(missing_ok=True)
        outputs.unlink(missing_ok=True)
