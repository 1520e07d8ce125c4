"""Which layers quantization hurts: measured by running the network with one layer, or a group, back in float.

Each subset is a plain Q/DQ graph with a session of its own, made in 0.03-0.1 s. One graph with a switch for every layer
was tried and is slower as a whole: it costs onnxruntime its fused convolutions. EfficientNet-Lite0 at 8 images on one
thread takes 0.27 s as plain Q/DQ, 0.58 s with each layer inside an If, 0.53 s with a Where at each input (MobileNetV2:
0.14, 0.28, 0.42). A ranking from local error alone is no substitute (Spearman -0.23; `../shared/FACTS.md`).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from trtforge.calibration.fit import Fit
from trtforge.calibration.placement import quantizable_tensors
from trtforge.calibration.qdq import insert_qdq
from trtforge.calibration.ranges import Ranges
from trtforge.runtime.errors import CalibrationError
from trtforge.runtime.graph import node_refs
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
from trtforge.runtime.precision import NodeRef, PrecisionPlan, Rule
from trtforge.runtime.publish import scratch_folder
from trtforge.runtime.runner import Tensors

__all__ = ["LayerGain", "OnEvent", "Score", "Sensitivity", "keep_in_float", "rank_layers", "score_plan", "worst_sqnr"]

Score = Callable[[Sequence[Tensors], Sequence[Tensors]], float]
"""`score(reference, candidate)`: outputs of the float and of the quantized model, sample by sample; more is better."""
OnEvent = Callable[[dict[str, Any]], None]

_LARGEST_MESSAGE = 1_800_000_000  # bytes; protobuf ends at 2 GiB
_FLAWLESS = 300.0  # dB


@dataclass(frozen=True, slots=True)
class LayerGain:
    """A layer: id, operator and module, the score with it alone in float, and its gain over everything quantized."""

    node: str
    op: str
    module: str
    score: float
    gain: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Layers by measured harm.

    Attributes:
        quantized: The score with every layer quantized as the plan says.
        layers: Those that were measured one by one, the most harmful first.
        measure: What the scores are, for people: "SQNR in dB", or the name of the caller's function.
        samples: How many sets of inputs each score was taken over.
        runs: How many subsets were measured.
        seconds: How long that took.
    """

    quantized: float
    layers: tuple[LayerGain, ...]
    measure: str
    samples: int
    runs: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All fields by name; layers as a list of objects."""
        data: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        data["layers"] = [{name: getattr(layer, name) for name in LayerGain.__slots__} for layer in self.layers]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sensitivity:
        """The inverse of `to_json`."""
        return cls(**{**data, "layers": tuple(LayerGain(**layer) for layer in data["layers"])})


def worst_sqnr(reference: Sequence[Tensors], candidate: Sequence[Tensors]) -> float:
    """The SQNR in dB over all samples of the float output that has the lowest.

    Capped at 300, which stands for no error at all; -300 for an output that is not finite.
    """
    found = []
    for name in reference[0]:
        if not np.issubdtype(reference[0][name].dtype, np.floating):
            continue
        signal = noise = 0.0
        for want, got in zip(reference, candidate, strict=True):
            wanted = np.asarray(want[name], dtype=np.float64)
            signal += float(np.sum(wanted**2))
            noise += float(np.sum((wanted - np.asarray(got[name], dtype=np.float64)) ** 2))
        found.append(_decibels(signal, noise))
    if not found:
        raise CalibrationError(
            "the model has no float output to score",
            why=f"its outputs are {', '.join(f'{name} ({array.dtype})' for name, array in reference[0].items())}",
            fix="pass a `score` of your own, or export the logits instead of the labels",
        )
    return min(found)


def _decibels(signal: float, noise: float) -> float:
    if not (np.isfinite(signal) and np.isfinite(noise)):
        return -_FLAWLESS
    if noise == 0:
        return _FLAWLESS
    return max(-_FLAWLESS, min(_FLAWLESS, 10 * float(np.log10(signal / noise)))) if signal > 0 else -_FLAWLESS


def rank_layers(
    model: ir.Model,
    ranges: Ranges,
    plan: PrecisionPlan,
    samples: Iterable[Tensors],
    *,
    score: Score | None = None,
    strategy: Literal["each", "bisect"] = "each",
    worst: int = 8,
    fit: Fit | None = None,
    attention: bool = True,
    provider: str = "cpu",
    threads: int | None = None,
    on_event: OnEvent | None = None,
) -> Sensitivity:
    """Ranks the layers that `plan` quantizes by what each gains when it is left in float.

    Args:
        model: The float32 graph with ids; not changed.
        ranges: Ranges of what the plan quantizes.
        plan: What is quantized; its float precision plays no part, everything else runs in float32.
        samples: Sets of inputs; kept in memory together with the outputs.
        score: What to measure; without one, `worst_sqnr`.
        strategy: "each" measures every layer. "bisect" measures halves, and goes on in the half that gains most, until
            `worst` layers are found: fewer runs where layers are many and few of them harmful.
        worst: How many layers "bisect" looks for.
        fit: Codes and biases fitted to the data, as for `insert_qdq`.
        attention: As for `quantizable_tensors`.
        provider: The onnxruntime provider, "cpu" or "cuda".
        threads: Threads of onnxruntime; None leaves it the choice.
        on_event: Receives `{"event": "progress", "phase": "sensitivity", "done", "total", "layer", "gain"}` after each
            run; `layer` is the id of the group's first layer; `total` is an upper bound for "bisect".

    Raises:
        CalibrationError: no samples, nothing to quantize, or ranges that do not fit.
    """
    start = time.perf_counter()
    bench = _Bench(
        model, ranges, plan, samples, score, fit=fit, attention=attention, provider=provider, threads=threads
    )
    if not bench.layers:
        raise CalibrationError("the plan quantizes no layer of this model", fix="give it a rule for int8 or fp8")
    quantized = bench.measure(frozenset())
    total = len(bench.layers) * (1 if strategy == "each" else 2)
    done = 0

    def gain(group: Sequence[str]) -> float:
        nonlocal done
        found = bench.measure(frozenset(group)) - quantized
        done += 1
        if on_event is not None:
            report = {"done": done, "total": max(total, done), "layer": group[0], "gain": found}
            on_event({"event": "progress", "phase": "sensitivity", **report})
        return found

    if strategy == "each":
        gains = {layer: gain([layer]) for layer in bench.layers}
    else:
        gains = _bisect(bench.layers, gain, worst)
    refs = {ref.id: ref for ref in node_refs(model)}
    order = sorted(gains, key=lambda layer: -gains[layer])
    layers = tuple(LayerGain(n, refs[n].op, refs[n].module, quantized + gains[n], gains[n]) for n in order)
    measure = "SQNR in dB" if score is None else getattr(score, "__name__", "score")
    return Sensitivity(quantized, layers, measure, len(bench.samples), bench.runs, time.perf_counter() - start)


def score_plan(
    model: ir.Model,
    ranges: Ranges,
    plan: PrecisionPlan,
    samples: Iterable[Tensors],
    *,
    score: Score | None = None,
    fit: Fit | None = None,
    attention: bool = True,
    provider: str = "cpu",
    threads: int | None = None,
) -> float:
    """The score of a whole plan's quantization, measured as `rank_layers` does: its arguments, its errors."""
    bench = _Bench(
        model, ranges, plan, samples, score, fit=fit, attention=attention, provider=provider, threads=threads
    )
    return bench.measure(frozenset())


def keep_in_float(
    plan: PrecisionPlan, sensitivity: Sensitivity, count: int, refs: Sequence[NodeRef], graph: str
) -> PrecisionPlan:
    """`plan` with rules that leave the `count` most harmful layers in its float precision.

    A layer is named by module and operator where those select it alone, which holds for other exports of the model too;
    else by id, and the plan is bound to `graph`. Layers that gain nothing get no rule.

    Args:
        plan: What was ranked.
        sensitivity: The ranking.
        count: How many layers at most.
        refs: `node_refs` of the model that was ranked.
        graph: Its `graph_hash`.
    """
    rules = []
    for layer in sensitivity.layers[:count]:
        if layer.gain <= 0:
            break
        reason = f"{sensitivity.measure} rises from {sensitivity.quantized:.4g} to {layer.score:.4g} with it in float"
        rule = Rule(plan.float_default, module=layer.module, op=layer.op, origin="sensitivity", reason=reason)
        if not layer.module or [ref.id for ref in refs if rule.matches(ref)] != [layer.node]:
            rule = Rule(plan.float_default, id=layer.node, origin="sensitivity", reason=reason)
        rules.append(rule)
    by_id = any(rule.id is not None for rule in rules)
    return plan.with_rules(rules, graph=graph if by_id else None)


def _bisect(layers: Sequence[str], gain: Callable[[Sequence[str]], float], worst: int) -> dict[str, float]:
    """Gains of the `worst` layers that best-first search through halves comes upon."""
    found: dict[str, float] = {}
    order = 0
    waiting: list[tuple[float, int, Sequence[str]]] = [(0.0, order, layers)]
    while waiting and len(found) < worst:
        negative, _, group = heapq.heappop(waiting)
        if len(group) == 1:
            found[group[0]] = gain(group) if len(layers) == 1 else -negative
            continue
        middle = len(group) // 2
        for half in (group[:middle], group[middle:]):
            order += 1
            heapq.heappush(waiting, (-gain(half), order, half))
    return found


class _Bench:
    """Float outputs of all samples, and the score of any subset of layers left in float."""

    def __init__(
        self,
        model: ir.Model,
        ranges: Ranges,
        plan: PrecisionPlan,
        samples: Iterable[Tensors],
        score: Score | None,
        *,
        fit: Fit | None,
        attention: bool,
        provider: str,
        threads: int | None,
    ) -> None:
        self.samples = list(samples)
        if not self.samples:
            raise CalibrationError("there are no samples to measure sensitivity on", fix="give at least one")
        self.placement = quantizable_tensors(model, plan, attention=attention)
        self.layers = self.placement.nodes
        self.ranges, self.fit = ranges, fit
        self.score = score or worst_sqnr
        self.provider = provider
        self.threads = threads
        self.runs = 0
        ir.external_data.load_to_model(model)
        # The protobuf is shared by all variants: reading it again copies no weight.
        self.proto: onnx.ModelProto = ir.to_proto(model)
        self.reference = self._run(model)

    def measure(self, in_float: frozenset[str]) -> float:
        """The score with these layers in float and all others quantized."""
        self.runs += 1
        variant = ir.from_proto(self.proto)
        insert_qdq(variant, self.placement.without(in_float), self.ranges, self.fit)
        return self.score(self.reference, self._run(variant))

    def _run(self, model: ir.Model) -> list[Tensors]:
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
        if size < _LARGEST_MESSAGE:
            return self._run_all(ir.to_proto(model).SerializeToString())
        with scratch_folder() as folder:
            path = folder / "variant.onnx"
            ir.save(model, path, external_data="variant.onnx.data")
            return self._run_all(path)

    def _run_all(self, source: Path | bytes) -> list[Tensors]:
        runner = OnnxRuntimeRunner(source, disable_quant_qdq=True, provider=self.provider, threads=self.threads)
        return [runner.run(feeds) for feeds in self.samples]
