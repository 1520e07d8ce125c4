"""Names nearest to a wrong one, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(wrong: str, known: Iterable[str], *, limit: int = 3) -> str:
    """One phrase: "did you mean 'x'?" where something is near, else the known names (at most ten of them)."""
    names = sorted(set(known))
    close = difflib.get_close_matches(wrong, names, n=limit, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    if not names:
        return "there is nothing to choose from"
    shown = ", ".join(names[:10])
    return f"one of: {shown}" + (f", and {len(names) - 10} more" if len(names) > 10 else "")
