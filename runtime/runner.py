"""The one seam: something that runs a model on numpy arrays. Tests may put a fake here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from trtforge.runtime.specs import TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.generic]
else:
    Array = Any

__all__ = ["Array", "Runner", "Tensors"]

Tensors = Mapping[str, Array]
"""Arrays by tensor name. bfloat16 is `ml_dtypes.bfloat16`, which onnx installs."""


class Runner(Protocol):
    """Runs one model; `name` and `version` say what runs it ("onnxruntime", "1.30.0")."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def run(self, feeds: Tensors) -> dict[str, Array]:
        """Outputs by name for one set of inputs; nothing given or returned is aliased or overwritten later."""
        ...
