"""Element types as TensorRT names them, and as numpy and torch do."""

from __future__ import annotations

from typing import Any

__all__ = ["dtype_name"]

_NAMES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool", "FP8": "float8_e4m3fn",
}  # fmt: skip


def dtype_name(dtype: Any) -> str:
    """A `tensorrt.DataType` by the name that numpy, torch and `TensorSpec` use; TensorRT's own for the rest (INT4)."""
    name: str = dtype.name
    return _NAMES.get(name, name.lower())
