"""The search for a plan: measures groups of layers, puts back what does harm, and looks whether that is enough.

Nothing runs here: `harm` and `look` are plain callables. Errors of layers add up as powers do, nearly: what one half of
a group adds is known once the group and the other half were measured, so a split costs one measurement. What is as
large as the signal does not add up, nor do NaN and Inf; there both halves are measured, and culprits isolated.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Group", "Harm", "Look", "Mended", "Score", "Unit", "mend", "rank_units"]

_NEGLIGIBLE = 0.01
"""Of all harm: a group that does no more is not taken apart."""
_SATURATED = 0.1
"""Of the output's power: an error as large is not the sum of its parts any more (an overflow that is divided by)."""
_ADDS = 0.1
"""By so much of a group's power its parts' powers are taken to fail to add up. It happens: see docs/results.md."""
_SPARED = 0.01
"""Of all work: sparing less is not worth another look."""
_ROOTS = (0.15, 1.0)
"""Between these is the exponent of the error power that answers go by, whatever two looks that scatter say."""
_EACH = 0.1
"""What putting back any layer costs beside its multiply-accumulates, spread over all of them: casts and lost fusion."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A layer that can run in the low precision: its node's id, and its share of the multiply-accumulates."""

    id: str
    share: float


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that are put back together, and the error power that they add alone in the low precision.

    `harm` is relative to the output's own power; infinite where it gives NaN or Inf.
    """

    units: tuple[Unit, ...]
    harm: float

    @property
    def share(self) -> float:
        """Of the multiply-accumulates."""
        return sum(unit.share for unit in self.units)


@dataclass(frozen=True, slots=True)
class Score:
    """What a look at a plan found.

    Attributes:
        passed: Within budget and tolerances.
        reason: One sentence.
        shrink: By what factor the error's amplitude has to change to be just allowed: below 1 where it failed, above
            where there is room; None where that is not known.
        cost: What it costs to run, in a unit that is the same for all plans of one search.
        facts: For the table.
    """

    passed: bool
    reason: str
    shrink: float | None
    cost: float
    facts: dict[str, Any] = field(default_factory=dict)


Harm = Callable[[Sequence[Unit]], float]
"""The error power relative to the output's with these layers alone in the low precision."""
Look = Callable[[Sequence[Group]], Score]
"""The score with the layers of these groups put back and all others in the low precision."""


@dataclass(frozen=True, slots=True)
class Mended:
    """What was put back, and the score with that; `score.passed` is False where no look found enough."""

    kept: tuple[Group, ...]
    score: Score


def rank_units(units: Sequence[Unit], harm: Harm, evaluations: int) -> tuple[Group, ...]:
    """Groups by what they add, found by taking the worst group apart again and again.

    Args:
        units: Neighbours share groups.
        harm: Measures a group alone.
        evaluations: How often it may be called, at least once.

    Returns:
        Groups that together hold every unit once; those that give NaN or Inf first, then by harm.
    """
    search = _Ranking(harm, evaluations)
    search.run(tuple(units))
    return tuple(sorted(search.done, key=lambda group: -group.harm))


@dataclass(slots=True)
class _Entry:
    """A group in the queue; `suspect` is the smallest group around it that was measured as infinite.

    `joint`: it is known that no single layer of it is infinite alone. `doubt`: how wrong an inferred harm may be.
    """

    units: tuple[Unit, ...]
    harm: float
    measured: bool
    suspect: tuple[Unit, ...] = ()
    joint: bool = False
    doubt: float = 0.0


class _Ranking:
    def __init__(self, harm: Harm, evaluations: int) -> None:
        self.harm = harm
        self.left = evaluations
        self.order = itertools.count()
        self.waiting: list[tuple[float, int, int, _Entry]] = []
        self.done: list[Group] = []

    def run(self, units: tuple[Unit, ...]) -> None:
        if not units:
            return
        first = self._measure(units)
        self._wait(first)
        total = first.harm
        while self.waiting:
            *_, entry = heapq.heappop(self.waiting)
            if entry.doubt > entry.harm and self.left > 0:
                self._wait(self._measure(entry.units))
                continue
            small = math.isfinite(total) and entry.harm <= _NEGLIGIBLE * total
            if len(entry.units) == 1:
                self._finish(entry)
            elif small or self.left <= 0:
                self.done.append(Group(entry.units, entry.harm))
            else:
                self._split(entry)

    def _measure(self, units: tuple[Unit, ...]) -> _Entry:
        self.left -= 1
        found = self.harm(units)
        found = found if math.isfinite(found) else math.inf
        return _Entry(units, found, True, units if math.isinf(found) else ())

    def _wait(self, entry: _Entry) -> None:
        # Of infinite ones the smallest first: a culprit is isolated before the next one is looked for.
        heapq.heappush(self.waiting, (-entry.harm, len(entry.units), next(self.order), entry))

    def _split(self, entry: _Entry) -> None:
        middle = len(entry.units) // 2
        first = self._measure(entry.units[:middle])
        rest = entry.units[middle:]
        if entry.joint:
            self._split_joint(entry, first, rest)
            return
        self._wait(first)
        if math.isfinite(entry.harm) and entry.harm > _SATURATED and self.left > 0:
            self._wait(self._measure(rest))
        elif math.isfinite(first.harm):
            # Where the whole is infinite and this half is not, the other one has to be.
            doubt = entry.doubt + _ADDS * entry.harm if math.isfinite(entry.harm) else 0.0
            self._wait(_Entry(rest, max(entry.harm - first.harm, 0.0), False, entry.suspect, doubt=doubt))
        elif self.left > 0:
            self._wait(self._measure(rest))
        else:
            self.done.append(Group(rest, math.inf))

    def _split_joint(self, entry: _Entry, first: _Entry, rest: tuple[Unit, ...]) -> None:
        second = self._measure(rest) if self.left > 0 else _Entry(rest, math.inf, False)
        halves = (first, second)
        if not any(math.isinf(half.harm) for half in halves):
            self.done.append(Group(entry.units, math.inf))
            return
        for half in halves:
            half.joint = math.isinf(half.harm)
            self._wait(half)

    def _finish(self, entry: _Entry) -> None:
        if math.isinf(entry.harm) and not entry.measured and self.left > 0 and len(entry.suspect) > 1:
            found = self._measure(entry.units)
            if math.isfinite(found.harm):
                # It takes several of them together: the smallest such group is put back together.
                inside = {unit.id for unit in entry.suspect}
                self.waiting = [item for item in self.waiting if not inside & {unit.id for unit in item[3].units}]
                heapq.heapify(self.waiting)
                self.done = [group for group in self.done if not inside & {unit.id for unit in group.units}]
                self._wait(_Entry(entry.suspect, math.inf, True, entry.suspect, joint=True))
                return
        self.done.append(Group(entry.units, entry.harm))


def mend(groups: Sequence[Group], plain: Score, look: Look, *, looks: int, all_back: bool = True) -> Mended:
    """Puts groups back until a look passes, and then as few as pass.

    What gives NaN or Inf is put back first; then what does most harm for its share of the work, most harmful first.
    How many, is guessed from how far the looks so far were off, and narrowed between a failure and a pass.

    Args:
        groups: From `rank_units`.
        plain: The score with nothing put back, which did not pass.
        look: Scores a choice.
        looks: How many more looks are allowed.
        all_back: Whether a plan with everything put back is worth a look.
    """
    number = sum(len(group.units) for group in groups)
    order = sorted(groups, key=lambda group: (not math.isinf(group.harm), -group.harm / _price(group, number)))
    certain = sum(math.isinf(group.harm) for group in order)
    left = [sum(group.harm for group in order[count:] if math.isfinite(group.harm)) for count in range(len(order) + 1)]
    fails, passes = (0, plain), len(order) if all_back else len(order) - 1
    best: Mended | None = None
    seen = [(0, plain)]
    for turn in range(looks):
        low = fails[0]
        if best is not None and (
            passes <= max(certain, low + 1) or sum(_price(g, number) for g in order[low + 1 : passes]) < _SPARED
        ):
            break
        if best is None and low >= passes:
            break
        middle = (low + passes + 1) // 2
        last = turn == looks - 1
        count = _guess(left, seen, certain, middle, generous=best is None and last)
        if best is None and not last:
            count = min(count, max(certain, _halfway(order, low, passes)))
        # Between what is known to fail and what is known, or taken, to pass.
        count = min(max(count, low + 1), passes - 1 if best is not None else passes)
        score = look(order[:count])
        seen.append((count, score))
        if score.passed:
            passes, best = count, Mended(tuple(order[:count]), score)
        else:
            fails = (count, score)
    return best or Mended(tuple(order[: fails[0]]), fails[1])


def _halfway(order: Sequence[Group], low: int, high: int) -> int:
    """As many groups from `low` on as are half the price of all up to `high`: an unbounded guess goes no further."""
    number = sum(len(group.units) for group in order)
    prices = list(itertools.accumulate(_price(group, number) for group in order[low:high]))
    return next((low + count for count, price in enumerate(prices, 1) if price >= prices[-1] / 2), high)


def _price(group: Group, number: int) -> float:
    """What it costs to put a group back, of `number` layers, as a share of all the work."""
    return group.share + _EACH * len(group.units) / number


def _guess(
    left: Sequence[float], seen: Sequence[tuple[int, Score]], certain: int, middle: int, *, generous: bool
) -> int:
    """How many groups to put back: the fewest that leave the error power that the looks so far say is allowed.

    By how much the amplitude is off goes with some root of the power: with the square root where every answer is moved
    alike, with a higher one where few samples hold most of the error. Two looks say which.

    Args:
        left: The error power that is left with so many groups put back.
        seen: Looks and how many groups each had put back.
        certain: How many are put back in any case.
        middle: What to try where looks say nothing.
        generous: Better too many than too few: there is no other look.
    """
    count, score = seen[-1]
    if count < certain:
        return certain
    if score.shrink is None:
        return middle
    known = [
        (math.log(found.shrink), math.log(left[number]))
        for number, found in seen
        if found.shrink and math.isfinite(found.shrink) and left[number] > 0 and number >= certain
    ]
    if not known:
        return middle
    known.sort(key=lambda point: abs(point[0]))  # the nearest to what is just allowed
    (off, power), *others = known
    root = 0.5
    if others and others[0][1] != power:
        root = min(max((others[0][0] - off) / (power - others[0][1]), _ROOTS[0]), _ROOTS[1])
    target = math.exp(power + (off + math.log(0.7 if generous else 0.97)) / root)
    return next((number for number, rest in enumerate(left) if number >= certain and rest <= target), len(left) - 1)
