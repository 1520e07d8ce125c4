"""The search's loop on made-up layers, whose harm is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.converter.search import Errors, Group, Score, Unit, mend


class Layers:
    """Layers whose error powers add; `fatal` ones give NaN."""

    def __init__(self, harms: Sequence[float], allowed: float, fatal: Sequence[int] = (), root: float = 0.5) -> None:
        self.harms, self.allowed, self.fatal, self.root = list(harms), allowed, set(fatal), root
        self.units = [Unit(str(i), 1 / len(self.harms)) for i in range(len(self.harms))]
        self.measured = self.looked = 0
        self.passed: list[int] = []

    def power(self, low: set[int]) -> float:
        return math.inf if low & self.fatal else sum(self.harms[i] for i in low)

    def harm(self, units: Sequence[Unit]) -> Errors | None:
        self.measured += 1
        return self.error({int(unit.id) for unit in units})

    def error(self, low: set[int]) -> Errors | None:
        """Errors that neither go together nor cancel: one value for each layer."""
        if math.isinf(self.power(low)):
            return None
        return np.array([math.sqrt(harm) if i in low else 0.0 for i, harm in enumerate(self.harms)])

    def look(self, kept: Sequence[Group]) -> Score:
        self.looked += 1
        back = {int(unit.id) for group in kept for unit in group.units}
        score = self.score(back)
        self.passed += [len(back)] if score.passed else []
        return score

    def score(self, kept: set[int]) -> Score:
        power = self.power(set(range(len(self.harms))) - kept)
        shrink = None if math.isinf(power) else (self.allowed / power) ** self.root if power else math.inf
        return Score(power <= self.allowed, f"{power:.3g}", shrink, 1 - len(kept) / len(self.harms))

    def mend(self, evaluations: int, looks: int) -> tuple[set[int], Score]:
        found = mend(self.units, self.harm, self.score(set()), self.look, evaluations=evaluations, looks=looks)
        assert self.measured <= evaluations
        assert self.looked <= looks
        return {int(unit.id) for group in found.kept for unit in group.units}, found.score


def few_bad_among_fifty(rng: np.random.Generator) -> tuple[Layers, set[int]]:
    harms = rng.exponential(0.0001, 50)
    bad = set(rng.choice(50, 4, replace=False).tolist())
    for index in bad:
        harms[index] = rng.uniform(0.01, 0.02)
    return Layers(harms, allowed=0.006), bad


def test_few_bad_layers_among_fifty_are_found_within_25_evaluations() -> None:
    for seed in range(20):
        layers, bad = few_bad_among_fifty(np.random.default_rng(seed))
        kept, score = layers.mend(20, 4)
        assert score.passed
        assert bad <= kept
        assert len(kept) <= 6
        assert layers.measured + layers.looked <= 24


def test_layers_that_round_otherwise_in_every_run_are_found_by_their_powers() -> None:
    # Behind other noise a layer's rounding errors are new ones: as large, with nothing in common with the old ones.
    for seed in range(10):
        rng = np.random.default_rng(seed)
        layers, bad = few_bad_among_fifty(rng)

        def error(low: set[int], layers: Layers = layers, rng: np.random.Generator = rng) -> Errors:
            drawn = rng.standard_normal((len(low), 4000))
            sizes = np.sqrt([layers.harms[i] for i in low]) / np.linalg.norm(drawn, axis=1)
            return np.asarray(sizes @ drawn)

        layers.error = error  # type: ignore[method-assign]
        kept, score = layers.mend(20, 4)
        assert score.passed
        assert bad <= kept
        assert len(kept) <= 6


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
        kept, score = layers.mend(200, 4)
        assert score.passed
        rest = harms.sum() - np.cumsum(np.sort(harms)[::-1])
        too_many.append(len(kept) - int(np.argmax(rest <= layers.allowed) + 1))
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
    assert len(kept) == min(layers.passed, default=len(kept))


def test_much_harm_for_little_work_goes_back_first() -> None:
    heavy, light = Unit("heavy", 0.5), Unit("light", 0.01)
    harms = {"heavy": 0.2, "light": 0.15}
    seen = []

    def look(kept: Sequence[Group]) -> Score:
        seen.append([group.units[0].id for group in kept])
        return Score(True, "", 1.0, 0.0)

    def harm(units: Sequence[Unit]) -> Errors:
        low = {unit.id for unit in units}
        return np.array([math.sqrt(power) if name in low else 0.0 for name, power in harms.items()])

    mend([heavy, light], harm, Score(False, "", 0.9, 0.0), look, evaluations=3, looks=3)
    assert seen == [["light"]]


@pytest.mark.parametrize("needed", [1, 5, 16, 31])
def test_a_group_that_was_never_taken_apart_is_put_back_in_part(needed: int) -> None:
    layers = Layers([1e-3] * 32, allowed=(32 - needed) * 1e-3 + 1e-9)
    kept, score = layers.mend(1, 6)
    assert score.passed
    assert needed <= len(kept) <= needed + 1


def test_runs_are_spent_where_they_decide() -> None:
    # The greater harm is in layers of no work, which go back whatever each of them does.
    shares = [0.0] * 16 + [1 / 16] * 16
    harms = [0.01] * 16 + [1e-5] * 16
    harms[21] = 5e-3
    layers = Layers(harms, allowed=1e-3)
    layers.units = [Unit(unit.id, share) for unit, share in zip(layers.units, shares, strict=True)]
    kept, score = layers.mend(9, 4)
    assert score.passed
    assert sum(shares[i] for i in kept) <= 2 / 16


def test_of_errors_that_go_together_one_goes_back_first() -> None:
    errors = {"a": [0.1, 0.0], "b": [0.1, 0.0], "alone": [0.0, 0.11]}
    units = [Unit(name, 1 / 3) for name in errors]

    def error(low: set[str]) -> Errors:
        return np.sum([errors[name] for name in low], axis=0) if low else np.zeros(2)

    def score(kept: Sequence[Group]) -> Score:
        power = float(np.square(error(set(errors) - {unit.id for group in kept for unit in group.units})).sum())
        return Score(power <= 0.025, "", math.sqrt(0.025 / power) if power else None, 0.0)

    found = mend(units, lambda units: error({u.id for u in units}), score(()), score, evaluations=5, looks=4)
    assert found.score.passed
    assert [[unit.id for unit in group.units] for group in found.kept] in ([["a"]], [["b"]])


def test_a_partly_kept_group_tells_with_how_many_it_was_measured() -> None:
    layers = Layers([1e-3] * 8, allowed=4e-3 + 1e-9)
    found = mend(layers.units, layers.harm, layers.score(set()), layers.look, evaluations=1, looks=4)
    (group,) = found.kept
    assert len(group.units) + group.beside == 8
    assert group.harm == pytest.approx(8e-3)


def test_where_no_error_is_seen_layers_are_halved() -> None:
    units = [Unit(str(number), 1 / 16) for number in range(16)]

    def look(kept: Sequence[Group]) -> Score:
        return Score(sum(len(group.units) for group in kept) >= 5, "", None, 0.0)

    found = mend(units, lambda _: np.zeros(0), look(()), look, evaluations=20, looks=6)
    assert found.score.passed
    assert sum(len(group.units) for group in found.kept) == 5
