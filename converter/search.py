"""The search for a plan: measures groups of layers, puts back what does harm, and looks whether that is enough.

Nothing runs here: `harm` and `look` are plain callables. Errors of layers add up as powers do, nearly: what one half of
a group adds is known once the group and the other half were measured, so a split costs one measurement. Where the
errors of two groups go together, or cancel, their inner product says by how much. What is as large as the signal does
not add up, nor do NaN and Inf; there both halves are measured, and culprits isolated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Errors", "Group", "Harm", "Look", "Mended", "Score", "Unit", "mend"]

_SATURATED = 0.1
"""Of the output's power: an error as large is not the sum of its parts any more (an overflow that is divided by)."""
_ADDS = 0.1
"""By so much of its power what was measured is taken to be off where it is taken from a whole: see docs/results.md."""
_SPARED = 0.002
"""Of all work: sparing less is not worth another run."""
_ROOTS = (0.15, 1.0)
"""Between these is the exponent of the error power that answers go by, whatever two looks that scatter say."""
_ROOT = math.sqrt(math.prod(_ROOTS))
"""Where one look alone says nothing of it."""
_LOOSE = 0.25
"""How firmly this holds: as two looks whose powers are apart by a factor of e to the root of it."""
_UNKNOWN = 0.03
"""Of the error power is taken to be allowed where the first look does not say by how much it was off."""
_EACH = 0.1
"""What putting back any layer costs beside its multiply-accumulates, spread over all of them: casts and lost fusion."""

_SAME = 1e-9
"""Powers that differ by less are one power, rounded otherwise."""

Errors = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Unit:
    """A layer that can run in the low precision: its node's id, and its share of the multiply-accumulates."""

    id: str
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Layers that are put back, and the error that they add alone in the low precision.

    Attributes:
        units: The layers.
        harm: The error's power, relative to the output's own; infinite where NaN or Inf came in.
        error: Of each value of the output, in units of the output's norm; None with NaN or Inf. Shape (N,), the same N
            in a whole search. Zeros where the group was not measured but inferred from others.
        beside: How many layers were measured with them and are not put back.
    """

    units: tuple[Unit, ...]
    harm: float
    error: Errors | None
    beside: int = 0

    @property
    def share(self) -> float:
        """Of the multiply-accumulates."""
        return sum(unit.share for unit in self.units)

    @classmethod
    def measured(cls, units: tuple[Unit, ...], error: Errors | None) -> Group:
        """Of an error that was measured for just these layers."""
        return cls(units, math.inf if error is None else float(error @ error), error)


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


Harm = Callable[[Sequence[Unit]], "Errors | None"]
"""The output's error with these layers alone in the low precision, as `Group` has it."""
Look = Callable[[Sequence[Group]], Score]
"""The score with the layers of these groups put back and all others in the low precision."""


@dataclass(frozen=True, slots=True)
class Mended:
    """What was put back, and the score with that; `score.passed` is False where no look found enough."""

    kept: tuple[Group, ...]
    score: Score


def mend(
    units: Sequence[Unit],
    harm: Harm,
    plain: Score,
    look: Look,
    *,
    evaluations: int,
    looks: int,
    all_back: bool = True,
) -> Mended:
    """Puts layers back until a look passes, and then as few as pass.

    Groups are taken apart where that decides most, with a quarter of the runs behind the first look, which says much
    better where it will be decided. What gives NaN or Inf is put back first, in whole groups; then groups by
    what they take off of the error for their share of the work, and the layers of a group in their order, as if they
    shared its error alike. How many, is guessed from how far the looks so far were off, and narrowed between a failure
    and a pass.

    Args:
        units: Neighbours share groups, what probably does more harm before what does less.
        harm: Measures layers alone.
        plain: The score with nothing put back, which did not pass.
        look: Scores a choice.
        evaluations: How often `harm` may be called, at least once.
        looks: How many more looks are allowed.
        all_back: Whether a plan with everything put back is worth a look.
    """
    ranking = _Ranking(units, harm, evaluations)
    ranking.refine(evaluations // 4 if looks > 1 else 0, plain.shrink and plain.shrink ** (1 / _ROOT))
    line = _Line(ranking.groups)
    best: Mended | None = None
    seen: list[tuple[tuple[Group, ...], Score]] = [((), plain)]
    for turn in range(looks):
        if turn == 1 and line.bracket(seen, all_back) is not None:
            ranking.refine(0, line.allowed_share(seen))
            line = _Line(ranking.groups)
        bracket = line.bracket(seen, all_back)
        if bracket is None:
            break
        kept = line.first(_guess(line, seen, *bracket, found=best is not None, last=turn == looks - 1))
        score = look(kept)
        seen.append((kept, score))
        if score.passed and (best is None or line.cost(kept) < line.cost(best.kept)):
            best = Mended(kept, score)
    return best or Mended(*seen[-1])


@dataclass(slots=True, eq=False)
class _Entry:
    """A group in the queue; `suspect` is the smallest group around it that was measured as infinite.

    `joint`: it is known that no single layer of it is infinite alone. `doubt`: how wrong an inferred harm may be.
    """

    group: Group
    measured: bool
    suspect: tuple[Unit, ...] = ()
    joint: bool = False
    doubt: float = 0.0


class _Ranking:
    """What groups of layers add, found by taking them apart where that decides most.

    What gives NaN or Inf is taken apart first. Of the others, a group may at best turn out to be one layer of no work
    that does all its harm: then its other layers stay in the low precision, or need not go back at all. So it is worth
    the lesser of its work and of what it costs elsewhere to be rid of as much error.
    """

    def __init__(self, units: Sequence[Unit], harm: Harm, evaluations: int) -> None:
        self.harm = harm
        self.left = evaluations
        self.number = len(units)
        self.waiting: list[_Entry] = []
        self.done: list[Group] = []
        if units:
            self.waiting.append(self._measure(tuple(units)))

    @property
    def groups(self) -> tuple[Group, ...]:
        """All of them: together they hold every unit once."""
        return (*self.done, *(entry.group for entry in self.waiting))

    def refine(self, keep: int, allowed: float | None) -> None:
        """Measures until so many runs are left, what gives NaN or Inf with those as well.

        Args:
            keep: How many runs to leave.
            allowed: The share of the whole error power that may stay, as far as that is known.
        """
        while (entry := self._next(keep, _UNKNOWN if allowed is None else allowed)) is not None:
            self.waiting.remove(entry)
            if entry.group.error is not None and entry.doubt > entry.group.harm:
                self.waiting.append(self._measure(entry.group.units))
            elif len(entry.group.units) == 1:
                self._finish(entry)
            else:
                self._split(entry)

    def _next(self, keep: int, allowed: float) -> _Entry | None:
        """Of infinite ones the smallest: a culprit is isolated before the next one is looked for. Then the worthiest.

        None where nothing is worth a run any more.
        """
        broken = [entry for entry in self.waiting if entry.group.error is None]
        if broken and self.left > 0:
            return min(broken, key=lambda entry: len(entry.group.units))
        if broken or self.left <= keep or not self.waiting:
            return None
        worth = self._worth(allowed)
        best = max(range(len(worth)), key=worth.__getitem__)
        return self.waiting[best] if worth[best] >= _SPARED else None

    def _worth(self, allowed: float) -> list[float]:
        """For each that waits, how much work its parts may spare."""
        groups = [entry.group for entry in self.waiting]
        prices = [_price(group, self.number) for group in groups]
        steps = _put_back(groups, self.number)
        enough = allowed * (steps[0].left + steps[0].off)
        last = next((step for step in steps if step.left <= enough), steps[-1])
        rate = prices[last.index] / last.off if last.off > 0 else math.inf
        worth = [0.0] * len(groups)
        for step in steps:
            entry, price = self.waiting[step.index], prices[step.index]
            harm = max(step.off, entry.doubt)
            if harm > 0 and (len(entry.group.units) > 1 or entry.doubt > entry.group.harm):
                worth[step.index] = min(price, rate * harm)
        return worth

    def _measure(self, units: tuple[Unit, ...]) -> _Entry:
        self.left -= 1
        error = self.harm(units)
        return _Entry(Group.measured(units, error), True, units if error is None else ())

    def _split(self, entry: _Entry) -> None:
        """Measures the half that probably does less: taken from the whole, it leaves the other one well known.

        That is so for powers. Value by value it is not: with the other's noise before it a layer rounds otherwise, and
        the difference holds what both measurements of the same layers have not in common. So an inferred error has a
        power, and is taken to go together with no other.
        """
        whole, units = entry.group, entry.group.units
        middle = len(units) // 2
        first, second = units[:middle], self._measure(units[middle:])
        if entry.joint:
            self._split_joint(entry, first, second)
            return
        self.waiting.append(second)
        less = second.group.error
        if whole.error is not None and less is not None and (whole.harm <= _SATURATED or self.left <= 0):
            doubt = entry.doubt + _ADDS * second.group.harm
            rest = Group(first, max(whole.harm - second.group.harm, 0.0), np.zeros_like(less))
            self.waiting.append(_Entry(rest, False, doubt=doubt))
        elif whole.error is None and less is not None:
            # Where the whole is infinite and this half is not, the other one has to be.
            self.waiting.append(_Entry(Group.measured(first, None), False, entry.suspect))
        elif self.left > 0:
            self.waiting.append(self._measure(first))
        else:
            self.done.append(Group.measured(first, None))

    def _split_joint(self, entry: _Entry, units: tuple[Unit, ...], second: _Entry) -> None:
        first = self._measure(units) if self.left > 0 else _Entry(Group.measured(units, None), False)
        halves = (first, second)
        if not any(half.group.error is None for half in halves):
            self.done.append(entry.group)
            return
        for half in halves:
            half.joint = half.group.error is None
            self.waiting.append(half)

    def _finish(self, entry: _Entry) -> None:
        if entry.group.error is None and not entry.measured and self.left > 0 and len(entry.suspect) > 1:
            found = self._measure(entry.group.units)
            if found.group.error is not None:
                # It takes several of them together: the smallest such group is put back together.
                inside = {unit.id for unit in entry.suspect}
                self.waiting = [e for e in self.waiting if not inside & {unit.id for unit in e.group.units}]
                self.done = [group for group in self.done if not inside & {unit.id for unit in group.units}]
                self.waiting.append(_Entry(Group.measured(entry.suspect, None), True, entry.suspect, joint=True))
                return
        self.done.append(entry.group)


@dataclass(frozen=True, slots=True)
class _Step:
    """A group goes back: which one, the error power that this takes off, and what is left."""

    index: int
    off: float
    left: float


def _products(groups: Sequence[Group]) -> Errors:
    """Inner products of the errors of finite groups, shape (G, G); in the diagonal what was found of their powers."""
    errors = np.array([group.error for group in groups]).reshape(len(groups), -1)
    products: Errors = errors @ errors.T
    np.fill_diagonal(products, [group.harm for group in groups])
    return products


def _put_back(groups: Sequence[Group], number: int) -> list[_Step]:
    """The order in which finite groups go back: each time the one that takes off most error power for its price."""
    products = _products(groups)
    prices = np.array([_price(group, number) for group in groups])
    together, left = products.sum(1), float(products.sum())  # each error with all that is still there
    low = np.ones(len(groups), dtype=bool)
    steps = []
    for _ in groups:
        off = 2 * together - products.diagonal()
        best = int(np.argmax(np.where(low, off / prices, -np.inf)))
        left -= float(off[best])
        steps.append(_Step(best, float(off[best]), max(left, 0.0)))
        low[best] = False
        together -= products[:, best]
    return steps


class _Line:
    """Groups in the order in which they go back.

    Attributes:
        groups: All of them, those that give NaN or Inf first.
        certain: How many layers those hold: they are put back in any case.
        left: The error power that is left with so many layers put back; before `certain` as if all those were.
        spent: What it costs to put so many back, as a share of all the work.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.number = sum(len(group.units) for group in groups)
        self.broken = [group for group in groups if group.error is None]
        finite = [group for group in groups if group.error is not None]
        self.finite = [finite[step.index] for step in _put_back(finite, self.number)]
        self.products = _products(self.finite)
        self.groups = (*self.broken, *self.finite)
        self.certain = sum(len(group.units) for group in self.broken)
        self.left = [self.power(self.first(max(count, self.certain))) for count in range(self.number + 1)]
        prices = (_price(Group.measured((unit,), None), self.number) for group in self.groups for unit in group.units)
        self.spent = list(itertools.accumulate(prices, initial=0.0))

    def first(self, count: int) -> tuple[Group, ...]:
        """The first `count` layers, with what was measured of them."""
        found = []
        for group in self.groups:
            part, count = group.units[:count], count - len(group.units[:count])
            if part:
                found.append(replace(group, units=part, beside=len(group.units) - len(part)))
        return tuple(found)

    def cost(self, kept: Sequence[Group]) -> float:
        """What it costs to put these back."""
        return sum(_price(group, self.number) for group in kept)

    def power(self, kept: Sequence[Group]) -> float:
        """The error power with these put back; infinite where that leaves NaN or Inf."""
        back = {unit.id for group in kept for unit in group.units}
        if any(unit.id not in back for group in self.broken for unit in group.units):
            return math.inf
        rest = [sum(unit.id not in back for unit in group.units) / len(group.units) for group in self.finite]
        amplitude = np.sqrt(rest)
        return max(float(amplitude @ self.products @ amplitude), 0.0)

    def bracket(self, seen: Sequence[tuple[Sequence[Group], Score]], all_back: bool) -> tuple[int, int] | None:
        """How many layers fail, and how many pass or are taken to; None where nothing between is worth a look."""
        found = [self.reach(kept)[0] for kept, score in seen if score.passed]
        passes = min(found, default=self.number if all_back else self.number - 1)
        missed = [self.reach(kept)[1] for kept, score in seen if not score.passed]
        fails = max((count for count in missed if count < passes), default=0)
        if not found:
            return (fails, passes) if fails < passes else None
        if passes <= max(self.certain, fails + 1) or self.spent[passes] - self.spent[fails + 1] < _SPARED:
            return None
        return fails, passes

    def reach(self, kept: Sequence[Group]) -> tuple[int, int]:
        """The fewest layers that leave no more error power than these, and the most that leave no less.

        Where these leave none, their own number: then power says nothing.
        """
        power, count = self.power(kept), sum(len(group.units) for group in kept)
        if power == 0:
            return count, count
        most = max((n for n, rest in enumerate(self.left) if rest >= power * (1 - _SAME)), default=0)
        return self.enough(power * (1 + _SAME)), most

    def allowed(self, seen: Sequence[tuple[Sequence[Group], Score]], margin: float = 1.0) -> float | None:
        """The error power at which looks say that the error's amplitude is off by the factor `margin`.

        By how much the amplitude is off goes with some root of the power: with the square root where every answer is
        moved alike, with a higher one where few samples hold most of the error. Two looks say which, the better the
        farther apart they are.
        """
        looks = [(score.shrink, self.power(kept)) for kept, score in seen]
        known = [
            (math.log(off), math.log(power))
            for off, power in looks
            if off and math.isfinite(off) and 0 < power < math.inf
        ]
        if not known:
            return None
        (off, power), *others = sorted(known, key=lambda point: abs(point[0]))  # first what is nearest to the limit
        spans = [(before - power, shrunk - off) for shrunk, before in others]
        root = (_ROOT * _LOOSE - sum(a * b for a, b in spans)) / (_LOOSE + sum(a * a for a, _ in spans))
        return math.exp(power + (off + math.log(margin)) / min(max(root, _ROOTS[0]), _ROOTS[1]))

    def allowed_share(self, seen: Sequence[tuple[Sequence[Group], Score]]) -> float | None:
        """The same as a share of the error power with nothing put back."""
        allowed, whole = self.allowed(seen), self.left[0]
        return allowed / whole if allowed is not None and whole > 0 else None

    def enough(self, power: float) -> int:
        """The fewest layers that leave no more than this."""
        return next((n for n, rest in enumerate(self.left) if n >= self.certain and rest <= power), self.number)

    def between(self, low: int, high: int, share: float) -> int:
        """As many as cost that share of what lies between two numbers of layers."""
        wanted = self.spent[low] + share * (self.spent[high] - self.spent[low])
        return next((count for count in range(low + 1, high) if self.spent[count] >= wanted), high)


def _price(group: Group, number: int) -> float:
    """What it costs to put a group back, of `number` layers, as a share of all the work."""
    return group.share + _EACH * len(group.units) / number


def _guess(
    line: _Line, seen: Sequence[tuple[Sequence[Group], Score]], fails: int, passes: int, *, found: bool, last: bool
) -> int:
    """How many layers to put back: the fewest that leave the error power that the looks so far say is allowed.

    Args:
        line: What goes back.
        seen: Looks and what each had put back.
        fails: So many do not pass.
        passes: So many do, or are taken to.
        found: Whether a look passed.
        last: Whether there is no other look: without a pass, better too many than too few.
    """
    if math.isinf(line.power(seen[-1][0])):
        return max(line.certain, fails + 1)
    allowed = line.allowed(seen, 0.85 if last and not found else 0.97)
    count = line.enough(allowed) if seen[-1][1].shrink is not None and allowed else (fails + passes + 1) // 2
    if found:  # between, and not next to what is known
        nearest, farthest = (line.between(fails, passes, share) for share in (1 / 4, 3 / 4))
        return min(max(count, nearest, fails + 1), max(farthest, fails + 1), passes - 1)
    if not last:  # an unbounded guess goes no further than half
        count = min(count, max(line.certain, line.between(fails, passes, 1 / 2)))
    return min(max(count, fails + 1), passes)
