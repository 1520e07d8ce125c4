"""Where a candidate first goes wrong: bisection over lines through the graph, then the piece found there run alone.

Two graphs have the tensors of the float reference in common, by name: passes that carry out a plan keep them. Up to a
line the candidate computes, behind it the reference does: what the outputs then have of noise comes from before the
line. Halving the line's place finds the piece that adds most of it, the first one where several add alike, in a
logarithm of the number of nodes. That piece is then fed the reference's tensors, which tells its own error from
inherited ones. Where its own error is small the noise is rounding that a later node amplifies, and that one is found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from trtforge.runtime.runner import Array, Tensors
from trtforge.validation.cuts import Cut, constant_nodes, cut_graph, find_cuts, main_values, outer_values
from trtforge.validation.metrics import Sums, add_sums, is_float, sum_errors

__all__ = ["Bisection", "Growth", "Location", "Piece", "Run", "Side", "noise_of"]

Run = Callable[[ir.Model, Sequence[Tensors]], list[dict[str, Array]]]
"""Runs a graph on several sets of inputs. Feeds may hold more than the graph's inputs, in other float types."""

_MARKS = 7
"""Lines whose tensors leave one run of the candidate: three halvings for one engine build."""
_CHUNK = 24
"""Tensors that leave the reference at once while errors are followed through it."""
_EXPLAINED = 0.1
"""A piece whose own noise is below this share of what it adds to the outputs is no cause: something amplifies it."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two graphs, and what runs it and pieces of it."""

    model: ir.Model
    run: Run


@dataclass(frozen=True, slots=True)
class Location:
    """Nodes of the reference between two neighbouring lines, and the noise of the outputs at each.

    Attributes:
        nodes: Names, in order; one wherever both graphs know every tensor around it.
        before: Noise (`noise_of`) of the outputs where the candidate computes up to the nodes.
        after: The same with the nodes.
        total: Noise of the whole candidate.
        tensors: What the nodes make that is needed behind them.
    """

    nodes: tuple[str, ...]
    before: float
    after: float
    total: float
    tensors: tuple[str, ...]

    @property
    def share(self) -> float:
        """What part of the whole noise these nodes add, 0 to 1; 1 where it is infinite."""
        if math.isinf(self.after):
            return 1.0
        return max(0.0, min(1.0, (self.after - self.before) / max(self.total, self.after))) if self.after else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The nodes of a location as the candidate has them, fed the reference's tensors.

    Attributes:
        model: The candidate's sub-graph.
        inputs: The reference's tensors that it was fed, one mapping a sample.
        expected: The reference's tensors that it should give.
        got: What it gave.
        own: Noise of `got`.
    """

    model: ir.Model
    inputs: Sequence[Tensors] = field(repr=False)
    expected: Sequence[Tensors] = field(repr=False)
    got: Sequence[Tensors] = field(repr=False)
    own: float


@dataclass(frozen=True, slots=True)
class Growth:
    """A node that amplifies the noise of what it reads: `after` is at least `before`; noise-to-signal ratios."""

    node: str
    before: float
    after: float


def noise_of(expected: Sequence[Tensors], got: Sequence[Tensors]) -> float:
    """Noise-to-signal ratio, summed over tensors: sum of squared errors over that of squares, over all samples.

    +inf where `got` holds NaN or Inf that `expected` does not. Of integers and booleans the share that differs.
    """
    return math.fsum(_ratio(sums, exact) for sums, exact in _pool(expected, got).values())


def _pool(expected: Sequence[Tensors], got: Sequence[Tensors]) -> dict[str, tuple[Sums, bool]]:
    pooled: dict[str, tuple[Sums, bool]] = {}
    for want, found in zip(expected, got, strict=True):
        for name, array in want.items():
            other = found[name]
            if array.shape != other.shape:
                sums = Sums(count=array.size, mismatches=array.size, candidate_nonfinite=array.size)
            else:
                sums = sum_errors(array, other)
            before = pooled[name][0] if name in pooled else Sums()
            pooled[name] = add_sums(before, sums), not is_float(array)
    return pooled


def _ratio(sums: Sums, exact: bool) -> float:
    if sums.candidate_nonfinite > sums.reference_nonfinite:
        return math.inf
    if exact:
        return sums.mismatches / sums.count if sums.count else 0.0
    if not sums.error_sq:
        return 0.0
    return sums.error_sq / sums.reference_sq if sums.reference_sq else 1.0


class Bisection:
    """The search over one pair of graphs and some samples; `runs` counts how often each side ran.

    Args:
        reference: The float graph.
        candidate: The graph with a plan carried out; it has the reference's outputs.
        samples: Inputs by name.
        on_step: Called with the number of nodes that are left under suspicion.
    """

    def __init__(
        self,
        reference: Side,
        candidate: Side,
        samples: Sequence[Tensors],
        *,
        on_step: Callable[[int], None] = lambda left: None,
    ) -> None:
        self.runs: dict[str, int] = {"reference": 0, "candidate": 0}
        self._sides = {"reference": reference, "candidate": candidate}
        self._samples = samples
        self._on_step = on_step
        self._nodes = list(reference.model.graph)
        self._constant = constant_nodes(reference.model)
        self._outputs = tuple(dict.fromkeys(value.name or "" for value in reference.model.graph.outputs))
        values = main_values(candidate.model)
        self._known = {
            name
            for name, value in main_values(reference.model).items()
            if name in values and not value.is_initializer() and not values[name].is_initializer()
        }
        self._expected = self._run("reference", self._outputs, samples)

    def total(self) -> float:
        """Noise of the candidate's outputs."""
        return noise_of(self._expected, self._run("candidate", self._outputs, self._samples))

    def locate(self) -> Location | None:
        """The first piece that adds most of the noise; None where the candidate equals the reference."""
        total = self.total()
        if not total:
            return None
        cuts = find_cuts(self._sides["reference"].model, self._known)
        low, high = cuts[0], cuts[-1]
        before, after = 0.0, total
        while marks := _marks([cut for cut in cuts if low.position < cut.position < high.position], low, high):
            self._on_step(high.position - low.position)
            wanted = dict.fromkeys(name for mark in marks for name in mark.tensors)
            tensors = self._run("candidate", tuple(wanted), self._samples)
            while marks:
                middle = marks[len(marks) // 2]
                noise = noise_of(self._expected, self._finish(middle, tensors))
                # The half that adds more; the earlier one where the later cannot be told from it.
                if math.isinf(noise) or (not math.isinf(after) and noise - before >= after - noise):
                    high, after = middle, noise
                    marks = marks[: len(marks) // 2]
                else:
                    low, before = middle, noise
                    marks = marks[len(marks) // 2 + 1 :]
        nodes = [node for node in self._nodes[low.position : high.position] if node not in self._constant]
        made = {value.name for node in nodes for value in node.outputs}
        return Location(
            tuple(node.name or "" for node in nodes),
            before,
            after,
            total,
            tuple(name for name in high.tensors if name in made),
        )

    def noise_behind(self, nodes: Collection[str]) -> float:
        """Noise of the outputs with the candidate up to and with the last of `nodes`, and the reference behind it."""
        last = max(index for index, node in enumerate(self._nodes) if node.name in nodes)
        cut = self._cut_behind(last)
        return noise_of(self._expected, self._finish(cut, self._run("candidate", cut.tensors, self._samples)))

    def isolate(self, location: Location) -> Piece:
        """Runs the nodes of a location alone, on the reference's tensors."""
        candidate = self._sides["candidate"]
        piece = cut_graph(candidate.model, location.tensors, self._known - set(location.tensors))
        inputs = tuple(value.name or "" for value in piece.graph.inputs)
        tensors = self._run("reference", tuple(dict.fromkeys((*inputs, *location.tensors))), self._samples)
        fed = [{name: found[name] for name in inputs} for found in tensors]
        expected = [{name: found[name] for name in location.tensors} for found in tensors]
        self.runs["candidate"] += 1
        got = candidate.run(piece, fed)
        return Piece(piece, fed, expected, got, noise_of(expected, got))

    def follow(self, location: Location) -> Growth | None:
        """The node behind a location that amplifies most of what was wrong there; None where none does tenfold.

        The candidate computes up to and with the location, the reference the rest; each node's noise is compared with
        the greatest of what it reads.
        """
        end = self._cut_behind(max(index for index, node in enumerate(self._nodes) if node.name in location.nodes))
        tensors = self._run("candidate", end.tensors, self._samples)
        noise: dict[str, float] = {}
        behind = [node for node in self._nodes[end.position :] if node not in self._constant]
        names = [
            value.name or "" for node in behind for value in node.outputs if value.uses() or value.is_graph_output()
        ]
        floats = main_values(self._sides["reference"].model)
        names = [name for name in names if floats[name].dtype in _FLOATS]
        right = self._run("reference", end.tensors, self._samples)
        for name in end.tensors:
            noise[name] = noise_of([{name: s[name]} for s in right], [{name: s[name]} for s in tensors])
        for chunk in _chunks(names, _CHUNK):
            expected = self._run("reference", chunk, self._samples)
            got = self._finish(end, tensors, chunk)
            for name in chunk:
                noise[name] = noise_of([{name: s[name]} for s in expected], [{name: s[name]} for s in got])
        found = []
        for node in behind:
            after = max((noise.get(value.name or "", 0.0) for value in node.outputs), default=0.0)
            before = max((noise.get(value.name or "", 0.0) for value in outer_values(node)), default=0.0)
            if before and after >= 10 * before and after >= _EXPLAINED * location.after:
                found.append(Growth(node.name or "", before, after))
        return max(found, key=lambda growth: growth.after / growth.before, default=None)

    def explains(self, location: Location, piece: Piece) -> bool:
        """Whether the piece's own noise accounts for what it adds to the outputs."""
        return math.isinf(piece.own) or piece.own >= _EXPLAINED * (location.after - location.before)

    def _cut_behind(self, index: int) -> Cut:
        cuts = find_cuts(self._sides["reference"].model, self._known)
        return next(cut for cut in cuts if cut.position > index)

    def _finish(self, cut: Cut, tensors: Sequence[Tensors], outputs: Sequence[str] = ()) -> list[dict[str, Array]]:
        """The reference's tensors behind a cut, computed from what the candidate has there."""
        outputs = outputs or self._outputs
        model = self._sides["reference"].model
        values = main_values(model)
        feeds = []
        for sample, found in zip(self._samples, tensors, strict=True):
            fed = {name: sample[name] if name in sample else found[name] for name in cut.tensors}
            feeds.append({name: _as_type(array, values[name].dtype) for name, array in fed.items()})
        computed = tuple(name for name in outputs if name not in cut.tensors)
        results: list[dict[str, Array]] = [{} for _ in feeds]
        if computed:
            self.runs["reference"] += 1
            results = self._sides["reference"].run(cut_graph(model, computed, cut.tensors), feeds)
        return [
            {name: fed[name] if name in fed else result[name] for name in outputs}
            for fed, result in zip(feeds, results, strict=True)
        ]

    def _run(self, side: str, names: Sequence[str], samples: Sequence[Tensors]) -> list[dict[str, Array]]:
        """Tensors of one side from the graph's inputs on; graph inputs come back as they are."""
        made = tuple(name for name in names if name not in samples[0])
        results: list[dict[str, Array]] = [{} for _ in samples]
        if made:
            self.runs[side] += 1
            results = self._sides[side].run(cut_graph(self._sides[side].model, made), samples)
        return [
            {name: result[name] if name in result else sample[name] for name in names}
            for sample, result in zip(samples, results, strict=True)
        ]


_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def _as_type(array: Array, dtype: ir.DataType | None) -> Array:
    if dtype is None or not is_float(array):
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype.numpy(), copy=False)


def _marks(cuts: Sequence[Cut], low: Cut, high: Cut) -> list[Cut]:
    """Up to `_MARKS` of the cuts, evenly apart; of neighbours the one that fewest tensors cross."""
    if len(cuts) <= _MARKS:
        return list(cuts)
    span = (high.position - low.position) / (_MARKS + 1)
    chosen: dict[int, Cut] = {}
    for number in range(1, _MARKS + 1):
        ideal = low.position + number * span
        near = [cut for cut in cuts if abs(cut.position - ideal) <= span / 3]
        best = min(near or cuts, key=lambda cut: (len(cut.tensors) if near else 0, abs(cut.position - ideal)))
        chosen[best.position] = best
    return [chosen[position] for position in sorted(chosen)]


def _chunks(names: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    for start in range(0, len(names), size):
        yield tuple(names[start : start + size])
