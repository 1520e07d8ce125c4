"""`.pt2` files: read only where reading runs nothing but torch itself.

`torch.export.load` is not safe on its own (torch 2.14): it unpickles sample inputs and old weights without restriction
as soon as the restricted way fails, unpickles objects among the constants, loads AOTInductor's native libraries,
evaluates the text of sizes with sympy (which is Python's `eval`), resolves any attribute of `torch` as an operator, and
imports modules that enums and default factories in a call's structure name; `program.module()` then compiles guards,
which stand in the file as Python source. All of these are looked for here, and refused or switched off, before torch
sees the file.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtforge.runtime.errors import ConfigError, ExportError

if TYPE_CHECKING:
    import torch

__all__ = ["read_program"]

_SAFE_ENTRY = re.compile(
    r"(models/\w+\.json|data/(weights|constants|sample_inputs)/(weight_\d+|tensor_\d+|\w+\.json|\w+\.pt)|"
    r"extra/.*|archive_format|archive_version|version|byteorder|\.data/[\w.]+|\.format_version|\.storage_alignment)"
)
_SAFE_TARGET = re.compile(
    r"torch\.ops\.[A-Za-z]\w*(\.[A-Za-z_]\w*){1,2}|torch\.(sym_|_sym_)[a-z]+|math\.[a-z0-9]+|#\w+:[\w.]+|"
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_|lshift|rshift|"
    r"getitem)"
)
# A size is sympy's own printing, `FloorDiv(Symbol('s77', integer=True, positive=True), Integer(2))`: classes, flags,
# names of symbols and numbers; neither attributes nor functions.
_SAFE_TOKEN = re.compile(
    r"\s+|'\w+'|\d+(\.\d+)?(e[+-]?\d+)?|[A-Z][A-Za-z0-9]*(?=\()|[a-z]+(?==(?!=))|[su]\d+|z[su]f?\d+|True|False|true|false|"
    r"int_oo|oo|\*\*|//|[-+*/%(),=<>&|~!]"
)


def read_program(path: Path) -> torch.export.ExportedProgram:
    """Reads what `torch.export.save` wrote.

    Raises:
        ConfigError: the file could run code when it is read; nothing of it was.
        ExportError: it is no such file, is damaged, or needs operators or types that are not registered here.
    """
    import torch

    _check_archive(path)
    try:
        with _restricted_unpickling():
            program = torch.export.load(os.fspath(path))
    except Exception as error:  # torch.export.load raises whatever its readers met in the file
        raise ExportError(
            f"{path} cannot be loaded: {type(error).__name__}: {_first_line(error)}",
            why="it was saved by another release of torch, is damaged, or uses operators or types that are registered "
            f"by code that has not been imported (this is torch {torch.__version__})",
            fix="convert from its `factory` instead, or save it again with this torch and its own operators alone",
        ) from error
    # Python source from the file, which `program.module()` would compile; sizes are checked against `dims` instead.
    program._guards_code = []
    return program


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist()]
            if not any("/models/" in name for name in names):
                raise ExportError(
                    f"{path} holds no exported program",
                    why="it is a checkpoint, TorchScript, an AOTInductor package, or of torch before 2.8",
                    fix="save it with torch.export.save(torch.export.export(model.eval(), args), file)",
                )
            for name in names:
                if names.count(name) > 1:  # torch would read another one of them than we
                    raise _unsafe(path, f"holds {name!r} twice")
                inner = name.partition("/")[2]
                if not _SAFE_ENTRY.fullmatch(inner):
                    raise _unsafe(path, f"holds {inner!r}, which is native code or a pickled object")
                if inner.endswith(".json") and inner.startswith(("models/", "data/")):
                    _check_json(path, inner, archive.read(name))
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ExportError(f"{path} is not a .pt2 file: {error}", why="it is damaged, incomplete, or no .pt2") from error


def _check_json(path: Path, name: str, content: bytes) -> None:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is damaged: {name}: {error}") from error
    for key, value in _pairs(data):
        if key == "expr_str" and not _is_expression(str(value)):
            raise _unsafe(path, f"gives a size as {str(value)[:80]!r}, which is no arithmetic")
        if key == "target" and isinstance(value, str) and name.startswith("models/") and not _is_target(value):
            raise _unsafe(path, f"calls {value[:80]!r}, which is no operator")
        if key == "use_pickle" and value:
            raise _unsafe(path, f"{name} holds a pickled tensor")
        if isinstance(value, str) and ("__enum__" in value or "default_factory_module" in value):
            raise _unsafe(path, "the structure of its inputs or outputs imports a module")


def _pairs(data: Any) -> Iterator[tuple[str, Any]]:
    stack = [data]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _is_expression(text: str) -> bool:
    at = 0
    while at < len(text):
        token = _SAFE_TOKEN.match(text, at)
        if token is None:
            return False
        at = token.end()
    return True


def _is_target(text: str) -> bool:
    # The signature of the graph calls parameters "target" too: plain names, which torch only looks up by name.
    return "__" not in text and (_SAFE_TARGET.fullmatch(text) is not None or not text.startswith(_CODE))


_CODE = ("torch", "_operator", "math")
"""Beginnings that torch resolves to Python objects; every other text stays a text."""


def _unsafe(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} {what}, and is not loaded",
        why="reading it would run code that the configuration does not name",
        fix="export and save the model again here, or give its module as a `factory`",
    )


@contextmanager
def _restricted_unpickling() -> Iterator[None]:
    """Makes torch, which reads this variable at every load, never fall back to unrestricted pickles."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
