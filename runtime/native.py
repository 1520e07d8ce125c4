"""Finds the parts that are compiled where the package is installed, if there is a compiler: loaded by ctypes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

__all__ = ["load_native"]

_PACKAGE = Path(__file__).parents[1]


def load_native(name: str) -> ctypes.CDLL | None:
    """A compiled library of the package, as "runtime/_replay".

    None where it was not compiled, or is another machine's, or `TRTFORGE_NATIVE=0` asks for doing without.
    """
    if os.environ.get("TRTFORGE_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_PACKAGE / f"{name}.abi3.so"))
    except OSError:
        return None
