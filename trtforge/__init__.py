"""trtforge: PyTorch models to TensorRT engines, each with the proof that it equals the model it came from."""

from __future__ import annotations

__version__ = "0.1.0"
