"""Calling what the user named as `package.module:function`: the only code of theirs that is ever executed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.suggest import nearest

__all__ = ["UserCodeError", "call_reference", "find_reference", "find_value", "import_paths"]


class UserCodeError(ConfigError):
    """The user's own function raised; its exception is `__cause__`, and its traceback is what the user wants to see."""


@contextlib.contextmanager
def import_paths(*folders: Path) -> Iterator[None]:
    """`folders` come first in `sys.path` while the block runs."""
    added = [str(folder) for folder in folders]
    sys.path[:0] = added
    try:
        yield
    finally:
        for path in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(path)


def call_reference(reference: str, kwargs: Mapping[str, Any], *, folder: Path, what: str) -> Any:
    """Imports `package.module:function`, looking in `folder` and the working directory first, and calls it.

    Args:
        reference: `package.module:function`.
        kwargs: Keyword arguments.
        folder: The configuration file's folder.
        what: What errors call it: "factory", "loader".

    Raises:
        ConfigError: no such module or function (with the nearest names), not callable, or arguments that do not fit.
        UserCodeError: the function raised.
    """
    with import_paths(folder, Path.cwd()):
        function = _find(reference, what)
        _check_arguments(function, kwargs, reference, what)
        try:
            return function(**kwargs)
        except Exception as error:  # the user's code may raise anything; it is passed on whole as the cause
            raise UserCodeError(
                f"{what} {reference} raised {type(error).__name__}: {error}",
                fix="the traceback above is from your code; run it alone to debug it",
            ) from error


def find_reference(reference: str, *, folder: Path, what: str) -> Callable[..., Any]:
    """The function that `package.module:function` names, not called; arguments and errors as for `call_reference`."""
    with import_paths(folder, Path.cwd()):
        return _find(reference, what)


def find_value(reference: str, *, folder: Path, what: str) -> Any:
    """What `package.module:name` names, whatever it is; arguments and errors as for `call_reference`."""
    with import_paths(folder, Path.cwd()):
        return _look_up(reference, what, list)


def _find(reference: str, what: str) -> Callable[..., Any]:
    found = _look_up(reference, what, lambda names: [name for name in names if callable(names[name])])
    if not callable(found):
        raise ConfigError(f"{what} {reference} is {type(found).__name__}, not something that can be called")
    return found  # type: ignore[no-any-return]  # callable() has just said so


def _look_up(reference: str, what: str, eligible: Callable[[dict[str, Any]], list[str]]) -> Any:
    module_name, _, function_name = reference.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            parent = module_name.rpartition(".")[0]
            raise ConfigError(
                f"{what} {reference}: there is no module {error.name!r}",
                why=f"looked in {', '.join(repr(p) for p in sys.path[:2])} and in what is installed",
                fix=nearest(module_name, _module_names(parent)),
            ) from error
        raise UserCodeError(
            f"{what} {reference}: importing {module_name} needs {error.name!r}, which is not installed",
            fix=f"pip install {error.name}",
        ) from error
    except Exception as error:  # importing runs the user's module, which may raise anything
        raise UserCodeError(
            f"{what} {reference}: importing {module_name} raised {type(error).__name__}: {error}",
            fix="the traceback above is from your code; run it alone to debug it",
        ) from error
    found: Any = module
    for part in function_name.split("."):
        if not hasattr(found, part):
            names = {name: getattr(found, name, None) for name in dir(found) if not name.startswith("_")}
            raise ConfigError(
                f"{what} {reference}: {module_name} has no {function_name!r}",
                fix=nearest(function_name, eligible(names)),
            )
        found = getattr(found, part)
    return found


def _check_arguments(function: Callable[..., Any], kwargs: Mapping[str, Any], reference: str, what: str) -> None:
    import inspect

    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise ConfigError(
            f"{what} {reference}{signature} does not take kwargs {dict(kwargs)!r}: {error}",
            fix="correct `kwargs`",
        ) from None


def _module_names(parent: str) -> list[str]:
    if not parent:
        return [module.name for module in pkgutil.iter_modules()]
    try:
        spec = importlib.util.find_spec(parent)
    except (ImportError, ValueError):
        return []
    if spec is None or spec.submodule_search_locations is None:
        return []
    return [f"{parent}.{module.name}" for module in pkgutil.iter_modules(spec.submodule_search_locations)]
