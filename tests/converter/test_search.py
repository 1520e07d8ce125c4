"""The search's loop on made-up layers, whose harm is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.converter.search import Group, Score, Unit, mend, rank_units


class Layers:
    """Layers whose error powers add; `fatal` ones give NaN."""

    def __init__(self, harms: Sequence[float], allowed: float, fatal: Sequence[int] = (), root: float = 0.5) -> None:
        self.harms, self.allowed, self.fatal, self.root = list(harms), allowed, set(fatal), root
        self.units = [Unit(str(i), 1 / len(self.harms)) for i in range(len(self.harms))]
        self.measured = self.looked = 0

    def power(self, low: set[int]) -> float:
        return math.inf if low & self.fatal else sum(self.harms[i] for i in low)

    def harm(self, units: Sequence[Unit]) -> float:
        self.measured += 1
        return self.power({int(unit.id) for unit in units})

    def look(self, kept: Sequence[Group]) -> Score:
        self.looked += 1
        return self.score({int(unit.id) for group in kept for unit in group.units})

    def score(self, kept: set[int]) -> Score:
        power = self.power(set(range(len(self.harms))) - kept)
        shrink = None if math.isinf(power) else (self.allowed / power) ** self.root if power else math.inf
        return Score(power <= self.allowed, f"{power:.3g}", shrink, 1 - len(kept) / len(self.harms))

    def mend(self, evaluations: int, looks: int) -> tuple[set[int], Score]:
        groups = rank_units(self.units, self.harm, evaluations)
        assert sorted(int(unit.id) for group in groups for unit in group.units) == list(range(len(self.harms)))
        found = mend(groups, self.score(set()), self.look, looks=looks)
        assert self.measured <= evaluations
        assert self.looked <= looks
        return {int(unit.id) for group in found.kept for unit in group.units}, found.score


def test_few_bad_layers_among_fifty_are_found_within_25_evaluations() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        harms = rng.exponential(0.0001, 50)
        bad = set(rng.choice(50, 4, replace=False).tolist())
        for index in bad:
            harms[index] = rng.uniform(0.01, 0.02)
        layers = Layers(harms, allowed=0.006)
        kept, score = layers.mend(20, 4)
        assert score.passed
        assert bad <= kept
        assert len(kept) <= 6
        assert layers.measured + layers.looked <= 24


@pytest.mark.parametrize("fatal", [[3], [3, 4], [0, 31, 63], [17, 18, 40]])
def test_layers_that_overflow_are_isolated(fatal: list[int]) -> None:
    layers = Layers([1e-6] * 64, allowed=1e-3, fatal=fatal)
    kept, score = layers.mend(60, 4)
    assert score.passed
    assert kept == set(fatal)
    assert layers.looked == 1


def test_overflow_that_takes_two_layers_together_puts_them_back_together() -> None:
    layers = Layers([1e-6] * 16, allowed=1e-3)
    layers.power = lambda low: math.inf if {4, 6} <= low else 1e-6 * len(low)  # type: ignore[method-assign]
    kept, score = layers.mend(40, 4)
    assert score.passed
    assert {4, 6} & kept
    assert len(kept) <= 4


@pytest.mark.parametrize("root", [0.2, 0.35, 0.5, 0.8])
@pytest.mark.parametrize("share", [0.003, 0.02, 0.1])
def test_whatever_root_of_the_power_answers_go_by_four_looks_are_enough(root: float, share: float) -> None:
    too_many = []
    for seed in range(30):
        harms = np.random.default_rng(seed).lognormal(-10, 2, 60)
        layers = Layers(harms, allowed=share * float(harms.sum()), root=root)
        groups = [Group((unit,), harm) for unit, harm in zip(layers.units, harms, strict=True)]
        found = mend(groups, layers.score(set()), layers.look, looks=4)
        assert found.score.passed
        rest = harms.sum() - np.cumsum(np.sort(harms)[::-1])
        too_many.append(len(found.kept) - int(np.argmax(rest <= layers.allowed) + 1))
    assert np.mean(too_many) <= 2
    assert max(too_many) <= 6


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-6, 1), min_size=1, max_size=40), st.floats(1e-7, 10), st.integers(1, 30), st.integers(1, 6)
)
def test_whatever_the_layers_a_pass_is_a_pass(harms: list[float], allowed: float, evaluations: int, looks: int) -> None:
    layers = Layers(harms, allowed)
    if layers.score(set()).passed:
        return
    kept, score = layers.mend(evaluations, looks)
    assert score == layers.score(kept)


def test_much_harm_for_little_work_goes_back_first() -> None:
    heavy = Group((Unit("heavy", 0.5),), 0.2)
    light = Group((Unit("light", 0.01),), 0.15)
    seen = []

    def look(kept: Sequence[Group]) -> Score:
        seen.append([group.units[0].id for group in kept])
        return Score(True, "", 1.0, 0.0)

    mend([heavy, light], Score(False, "", 0.8, 0.0), look, looks=3)
    assert seen == [["light"]]
