"""The user's table of translations, from operators of `torch.library` to functions that express them in ONNX."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from types import CodeType, TracebackType
from typing import Any

import torch

from trtforge.converter.references import UserCodeError
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.suggest import nearest

__all__ = ["Translations", "find_raised", "read_table"]

Translations = Mapping[torch._ops.OpOverload, Any]
"""What `torch.onnx.export(custom_translation_table=…)` takes: an onnxscript or Python function by overload."""

_NAME = re.compile(r"(\w+)(?:::|\.)(\w+)(?:\.(\w+))?")


def read_table(given: object, *, name: str) -> dict[torch._ops.OpOverload, Any]:
    """Checks a table, and finds the operators that it names.

    Args:
        given: `{operator: function}`; an operator is an overload, an operator with one overload or a `default` one,
            what `torch.library.custom_op` returns, or a name: "namespace::name" or "namespace::name.overload".
        name: What errors call the table.

    Raises:
        ConfigError: no dict, an operator that is not registered (with the nearest names), a value that is no function.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{name} is {type(given).__name__}, not a dict", fix="{operator: onnxscript function}, for each operator"
        )
    table: dict[torch._ops.OpOverload, Any] = {}
    for key, function in given.items():
        overload = _find_overload(key, name)
        if not callable(function):
            raise ConfigError(
                f"{name}: the translation of {overload} is {type(function).__name__}, not a function",
                fix="an onnxscript function, or a function of ONNX values that calls onnxscript's operators",
            )
        signature = getattr(function, "op_signature", None)
        if signature is not None and not signature.outputs:  # torch.onnx then fails far from the cause
            raise ConfigError(
                f"{name}: the onnxscript function for {overload} does not say what it returns",
                fix="annotate it, `-> FLOAT[...]`, or write it as a plain function, without @script",
            )
        if overload in table:
            raise ConfigError(f"{name} has two translations of {overload}", fix="leave one of them out")
        table[overload] = function
    return table


def find_raised(error: BaseException, translations: Translations) -> UserCodeError | None:
    """The error for a translation of the table that raised; None where none did.

    Its cause is the exception with a traceback that begins in the user's function.

    Args:
        error: What torch.onnx raised; the exception of the user's function is in its chain.
        translations: The table.
    """
    codes = {code: overload for overload, function in translations.items() if (code := _code_of(function)) is not None}
    current: BaseException | None = error
    while current is not None:
        at: TracebackType | None = current.__traceback__
        while at is not None:
            if (overload := codes.get(at.tb_frame.f_code)) is not None:
                raised = UserCodeError(
                    f"custom_ops: the translation of {overload} raised {type(current).__name__}: {current}",
                    fix="the traceback above is from your code",
                )
                raised.__cause__ = current.with_traceback(at)
                return raised
            at = at.tb_next
        current = current.__cause__
    return None


def _find_overload(key: object, name: str) -> torch._ops.OpOverload:
    if isinstance(key, torch._ops.OpOverload):
        return key
    if isinstance(key, torch.library.CustomOpDef if hasattr(torch.library, "CustomOpDef") else ()):
        return key._opoverload  # type: ignore[no-any-return]
    if isinstance(key, torch._ops.OpOverloadPacket):
        return _only_overload(key, name)
    if not isinstance(key, str):
        raise ConfigError(
            f"{name}: {key!r} is {type(key).__name__}, not an operator", fix="torch.ops.namespace.name, or its name"
        )
    parts = _NAME.fullmatch(key)
    if parts is None:
        raise ConfigError(f"{name}: {key!r} is not namespace::name", fix=nearest(key, _registered()))
    namespace, operator, overload = parts.groups()
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    if packet is None:
        raise ConfigError(
            f"{name}: there is no torch operator {key!r}",
            why="it is registered when the module that defines it is imported",
            fix=nearest(f"{namespace}::{operator}", _registered()),
        )
    if overload is None:
        return _only_overload(packet, name)
    known: list[str] = packet.overloads()
    if overload not in known:
        raise ConfigError(f"{name}: {packet} has no overload {overload!r}", fix=nearest(overload, known))
    return getattr(packet, overload)  # type: ignore[no-any-return]


def _only_overload(packet: torch._ops.OpOverloadPacket, name: str) -> torch._ops.OpOverload:
    overloads: list[str] = packet.overloads()  # type: ignore[no-untyped-call]
    if "default" in overloads or len(overloads) == 1:
        return getattr(packet, "default" if "default" in overloads else overloads[0])  # type: ignore[no-any-return]
    raise ConfigError(f"{name}: {packet} has the overloads {', '.join(overloads)}", fix="name one of them")


def _registered() -> list[str]:
    """Names without overloads, the user's own first: torch's number thousands."""
    names = {text.partition(".")[0] for text in torch._C._dispatch_get_all_op_names()}
    own = {text for text in names if not text.startswith(("aten::", "prim", "_", "quantized::", "onednn::", "mkl"))}
    return sorted(own) or sorted(names)


def _code_of(function: Callable[..., Any]) -> CodeType | None:
    # An onnxscript function holds the Python function that it was made from.
    plain = inspect.unwrap(getattr(function, "function", function))
    return getattr(plain, "__code__", None)
