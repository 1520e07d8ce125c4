"""Einsum equations as TensorRT's parser reads them: lowercase letters, no spaces, no ellipsis, an explicit result."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

__all__ = ["normal_equation"]


def normal_equation(equation: str, ranks: Sequence[int | None]) -> str:
    """An equal equation without spaces, capitals, ellipses or an implied result.

    Args:
        equation: As ONNX has it, e.g. "B G H I D, B J D -> B G H I J" (MaxViT).
        ranks: Number of axes of each operand, where known.

    Returns:
        The equation unchanged where an ellipsis stands for axes of an unknown number, or 26 letters don't suffice.
    """
    text = re.sub(r"\s", "", equation)
    left, arrow, result = text.partition("->")
    terms = left.split(",")
    if not arrow:
        result = _implied_result(terms)
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True) if rank is not None
              if "..." in term]  # fmt: skip
    if "..." in left and len(widths) < sum("..." in term for term in terms):
        return equation
    letters = list(dict.fromkeys(letter for letter in text if letter.isalpha()))
    # An ellipsis of fewer axes is aligned to the right of a longer one, as in broadcasting.
    hidden = [f"...{position}" for position in range(max(widths, default=0))]
    names = _assign_letters(letters, hidden)
    if names is None:
        return equation
    written = [
        _write(term, names, hidden[len(hidden) - (rank - len(term.replace("...", ""))) :] if rank is not None else [])
        for term, rank in zip(terms, ranks, strict=True)
    ]
    return ",".join(written) + "->" + _write(result, names, hidden)


def _implied_result(terms: Sequence[str]) -> str:
    joined = "".join(term.replace("...", "") for term in terms)
    ellipsis = "..." if any("..." in term for term in terms) else ""
    return ellipsis + "".join(sorted(letter for letter in set(joined) if joined.count(letter) == 1))


def _assign_letters(letters: Sequence[str], hidden: Sequence[str]) -> dict[str, str] | None:
    """A lowercase letter for each: its own where it is free, so that a plain equation stays as it is."""
    names = {letter: letter for letter in letters if letter.islower()}
    for letter in [*letters, *hidden]:
        if letter not in names:
            used = set(names.values())
            wanted = [letter.lower(), *string.ascii_lowercase] if len(letter) == 1 else [*string.ascii_lowercase]
            free = [candidate for candidate in wanted if candidate not in used]
            if not free:
                return None
            names[letter] = free[0]
    return names


def _write(term: str, names: dict[str, str], hidden: Sequence[str]) -> str:
    before, dots, after = term.partition("...")
    middle = "".join(names[name] for name in hidden) if dots else ""
    return "".join(names[letter] for letter in before) + middle + "".join(names[letter] for letter in after)
