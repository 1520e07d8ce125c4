from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtforge.converter.einsum import normal_equation


@pytest.mark.parametrize(
    ("equation", "ranks", "expected"),
    [
        ("bij,bjk->bik", (3, 3), "bij,bjk->bik"),
        ("B G H I D, B G H J D -> B G H I J", (5, 5), "bghid,bghjd->bghij"),
        ("aB,Bc", (2, 2), "ab,bc->ac"),
        ("bA,a->bA", (2, 1), "bc,a->bc"),
        ("...ij,jk->...ik", (4, 2), "abij,jk->abik"),
        ("...i,...i", (3, 1), "abi,i->ab"),
        ("...ij,jk->...ik", (None, 2), "...ij,jk->...ik"),
    ],
)
def test_examples(equation: str, ranks: tuple[int | None, ...], expected: str) -> None:
    assert normal_equation(equation, ranks) == expected


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, list[tuple[int, ...]]]:
    letters = draw(st.lists(st.sampled_from(string.ascii_letters), min_size=1, max_size=5, unique=True))
    sizes = {letter: 2 + index % 3 for index, letter in enumerate(letters)}
    hidden = draw(st.integers(0, 2))
    terms, shapes = [], []
    for _ in range(draw(st.integers(1, 3))):
        own = draw(st.lists(st.sampled_from(letters), max_size=3, unique=True))
        at = draw(st.integers(0, len(own))) if hidden and draw(st.booleans()) else None
        shape = [sizes[letter] for letter in own]
        term = "".join(own)
        if at is not None:
            term = term[:at] + "..." + term[at:]
            shape = [*shape[:at], *range(4, 4 + hidden), *shape[at:]]
        terms.append(draw(st.sampled_from(["", " "])).join(term.replace("...", ".")).replace(".", "..."))
        shapes.append(tuple(shape))
    text = ",".join(terms)
    if draw(st.booleans()):
        present = [letter for letter in letters if letter in text]
        result = draw(st.permutations(present))
        text += " -> " + ("..." if "..." in text else "") + "".join(result)
    return text, shapes


@given(equations())
def test_the_equation_means_the_same(case: tuple[str, list[tuple[int, ...]]]) -> None:
    equation, shapes = case
    random = np.random.default_rng(0)
    operands = [random.integers(-3, 3, shape) for shape in shapes]
    plain = normal_equation(equation, [len(shape) for shape in shapes])
    assert plain.replace("->", "").replace(",", "").islower() or not any(map(str.isalpha, plain))
    assert " " not in plain
    assert "." not in plain
    assert "->" in plain
    np.testing.assert_array_equal(np.einsum(equation, *operands), np.einsum(plain, *operands))
    assert normal_equation(plain, [len(shape) for shape in shapes]) == plain
