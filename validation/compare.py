"""Compares a candidate's outputs with the golden set: structure first, then figures, then what they prove."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

from trtforge.runtime.runner import Array, Tensors
from trtforge.validation.golden import GoldenSet, Sample
from trtforge.validation.histogram import count_exponents, errors_by_magnitude
from trtforge.validation.metrics import Sums, add_sums, is_float, sum_errors
from trtforge.validation.parity import (
    Candidate,
    OutputResult,
    ParityReport,
    SampleResult,
    Verdict,
    worst_verdict,
)
from trtforge.validation.tolerance import Tolerance
from trtforge.validation.vacuity import Doubt, contrast, different_inputs, telling_pairs, why_constant, why_unresolved

__all__ = ["compare"]

_FIX_STRUCTURE = "compare names, shapes and dtypes of the model's outputs with those of the ONNX (`trtforge inspect`)"


def compare(
    golden: GoldenSet,
    outputs: Mapping[str, Tensors],
    tolerance: Tolerance,
    candidate: Candidate,
    *,
    fixed_outputs: Collection[str] = (),
    dtypes: Mapping[str, str] | None = None,
) -> ParityReport:
    """Compares, and never raises for what the candidate did.

    Samples, names, dtypes and shapes must agree before anything is measured. An output fails if a limit is not met over
    all samples together or in one of them, or if it holds NaN or Inf (in the same places as the reference too). An
    output that met its limits is not proved where it could not have missed them: it is empty, one value everywhere,
    or does not depend on the input by more than the candidate's error.

    A constant integer or boolean output, such as the mask of a batch without padding, and an output of `fixed_outputs`
    pass when they are equal and another output is proved; a note says so.

    Args:
        golden: The reference.
        outputs: The candidate's outputs by sample and output name: `run_samples`, or `load_outputs` of a child's file.
        tolerance: The limits.
        candidate: What ran.
        fixed_outputs: Outputs that need not depend on the input: anchors, position tables.
        dtypes: The dtypes that the candidate's outputs should have where they are not the reference's
            (a plan with `keep_io: false`).
    """
    samples = golden.samples
    reasons = [*_check_samples(samples, outputs), *_check_names(samples, outputs)]
    names = list(dict.fromkeys(name for sample in samples for name in sample.outputs))
    different = different_inputs([sample.inputs for sample in samples])
    terms = _Terms(tolerance, candidate, frozenset((samples[a].name, samples[b].name) for a, b in different))
    results = []
    for name in names:
        pairs = [(s, outputs[s.name][name]) for s in samples if name in s.outputs and name in outputs.get(s.name, {})]
        if pairs:
            results.append(_compare_output(name, pairs, terms, (dtypes or {}).get(name)))
    results = _settle(results, fixed_outputs)
    verdicts = [result.verdict for result in results]
    fixes = [r.fix for wanted in (Verdict.FAILED, Verdict.NOT_PROVED) for r in results if r.verdict is wanted]
    if reasons:
        verdicts.append(Verdict.FAILED)
        fixes.insert(0, _FIX_STRUCTURE)
    if not names:
        reasons.append(f"the reference has no {'outputs' if samples else 'samples'}, so nothing was compared")
        fixes.append("record the golden set again, with at least two samples of a model that returns tensors")
    reasons += [f"output {r.name!r}: {reason}" for r in results for reason in r.reasons]
    return ParityReport(
        candidate=candidate,
        reference=f"{golden.runner} {golden.version}",
        tolerance=tolerance,
        verdict=worst_verdict(*verdicts),
        reasons=tuple(reasons),
        outputs=tuple(results),
        samples=tuple(sample.name for sample in samples),
        fix=next(iter(fixes), ""),
    )


def _check_samples(samples: tuple[Sample, ...], outputs: Mapping[str, Tensors]) -> list[str]:
    known = {sample.name for sample in samples}
    reasons = []
    if missing := [sample.name for sample in samples if sample.name not in outputs]:
        reasons.append(
            f"the candidate has {len(samples) - len(missing)} of {len(samples)} samples, without {_list(missing)}"
        )
    if extra := [name for name in outputs if name not in known]:
        reasons.append(f"the candidate has samples that the golden set lacks: {_list(extra)}")
    return reasons


def _check_names(samples: tuple[Sample, ...], outputs: Mapping[str, Tensors]) -> list[str]:
    missing: dict[str, list[str]] = {}
    extra: dict[str, list[str]] = {}
    for sample in samples:
        found = outputs.get(sample.name)
        if found is None:
            continue
        for name in sample.outputs:
            if name not in found:
                missing.setdefault(name, []).append(sample.name)
        for name in found:
            if name not in sample.outputs:
                extra.setdefault(name, []).append(sample.name)
    return [
        *(f"the candidate lacks the output {name!r} (in {_list(where)})" for name, where in missing.items()),
        *(f"the reference lacks the candidate's output {name!r} (in {_list(where)})" for name, where in extra.items()),
    ]


@dataclass(frozen=True, slots=True)
class _Terms:
    """What every output is compared under; `different` holds the pairs of samples whose inputs differ."""

    tolerance: Tolerance
    candidate: Candidate
    different: frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class _Compared:
    """One output in one sample: the reference, and how far the candidate is from it."""

    sample: Sample
    reference: Array
    sums: Sums


def _compare_output(name: str, pairs: list[tuple[Sample, Array]], terms: _Terms, dtype: str | None) -> OutputResult:
    tolerance = terms.tolerance
    wanted = dtype or pairs[0][0].outputs[name].dtype.name
    result = OutputResult(name, pairs[0][0].outputs[name].dtype.name, Verdict.FAILED)
    if problems := _check_arrays(name, pairs, wanted):
        return replace(result, reasons=tuple(problems), fix=_FIX_STRUCTURE)
    compared = []
    for sample, array in pairs:
        reference = sample.outputs[name]
        sums = sum_errors(reference, array, atol=tolerance.atol or 0, rtol=tolerance.rtol or 0)
        compared.append(_Compared(sample, reference, sums))
    pooled = Sums()
    for item in compared:
        pooled = add_sums(pooled, item.sums)
    exact = not is_float(compared[0].reference)
    result = replace(
        result,
        pooled=pooled.measures(),
        samples=tuple(_judge_sample(item, pooled, tolerance, exact=exact) for item in compared),
        exponents=() if exact else count_exponents((sample.outputs[name], array) for sample, array in pairs),
        magnitudes=() if exact else errors_by_magnitude((sample.outputs[name], array) for sample, array in pairs),
    )
    if failures := _failures(result, compared, tolerance, exact=exact):
        return replace(result, reasons=tuple(failures), fix=_advise(pooled, terms.candidate))
    if doubt := why_constant(pooled) or _why_unresolved(compared, pooled, terms.different):
        return replace(result, verdict=Verdict.NOT_PROVED, reasons=(doubt.reason,), fix=doubt.fix)
    return replace(result, verdict=Verdict.PASSED)


def _why_unresolved(compared: list[_Compared], pooled: Sums, different: frozenset[tuple[str, str]]) -> Doubt | None:
    references = [item.reference for item in compared]
    names = [item.sample.name for item in compared]
    pairs = [(a, b) for a, b in combinations(range(len(names)), 2) if (names[a], names[b]) in different]
    telling = telling_pairs(pairs, [array.shape for array in references])
    return why_unresolved(pooled, contrast(references, telling), pairs=len(telling))


def _check_arrays(name: str, pairs: list[tuple[Sample, Array]], dtype: str) -> list[str]:
    problems = []
    kinds = {array.dtype.name for _, array in pairs}
    if kinds != {dtype}:
        problems.append(f"it is {' and '.join(sorted(kinds - {dtype}))}, {dtype} was expected")
    for sample, array in pairs:
        if array.shape != sample.outputs[name].shape:
            expected = list(sample.outputs[name].shape)
            problems.append(
                f"its shape is {list(array.shape)}, the reference's is {expected}, in sample {sample.name!r}"
            )
    return problems


def _judge_sample(item: _Compared, pooled: Sums, tolerance: Tolerance, *, exact: bool) -> SampleResult:
    measures = item.sums.measures(pooled)
    unmet = tolerance.unmet(measures, exact=exact, pooled=False) if item.sums.count else ()
    return SampleResult(item.sample.name, item.reference.shape, measures, unmet)


def _failures(result: OutputResult, compared: list[_Compared], tolerance: Tolerance, *, exact: bool) -> list[str]:
    found = []
    for item in compared:
        sums = item.sums
        if sums.reference_nonfinite:
            found.append(
                f"the reference itself holds {sums.reference_nonfinite} NaN or Inf in sample {item.sample.name!r}"
            )
        if sums.candidate_nonfinite:
            found.append(
                f"{sums.candidate_nonfinite} of {sums.count} values are NaN or Inf in sample {item.sample.name!r}"
            )
    assert result.pooled is not None
    if result.pooled.count:
        found += [
            f"{sentence}, over all samples" for sentence in tolerance.unmet(result.pooled, exact=exact, pooled=True)
        ]
    if not found:
        for sample in result.samples:
            found += [f"{sentence}, in sample {sample.sample!r}" for sentence in sample.unmet]
    return found


def _settle(results: list[OutputResult], fixed: Collection[str]) -> list[OutputResult]:
    """Equal outputs that could not have differed pass where they may be so and a proved output stands beside them."""
    if not any(result.verdict is Verdict.PASSED for result in results):
        return results
    return [_pass_with_note(result) if _may_be_constant(result, fixed) else result for result in results]


def _may_be_constant(result: OutputResult, fixed: Collection[str]) -> bool:
    if result.verdict is not Verdict.NOT_PROVED or result.pooled is None or not result.pooled.count:
        return False
    return result.name in fixed or "float" not in result.dtype


def _pass_with_note(result: OutputResult) -> OutputResult:
    notes = tuple(f"output {result.name!r} met its limits, which says little: {reason}" for reason in result.reasons)
    return replace(result, verdict=Verdict.PASSED, reasons=(), notes=notes, fix="")


def _advise(pooled: Sums, candidate: Candidate) -> str:
    """What to do about an output that failed its limits."""
    if pooled.reference_nonfinite:
        return "prove on inputs for which the model itself is finite: give the inputs `values`, or a loader"
    if pooled.candidate_nonfinite and candidate.precision == "fp16":
        return (
            "fp16 ends at 65504: `trtforge bisect` on the folder that was left names the layer that overflows and the "
            "rule that keeps it in fp32; or choose bf16"
        )
    if candidate.stage == "export" or candidate.precision == "fp32":
        return "it computes something else than the module: look for the first tensor that differs"
    return (
        "`trtforge bisect` on the folder that was left names the layer to blame and the rule that keeps it in fp32; or "
        "choose a more exact precision, or, where this error is acceptable, say so in `validation: {tolerance: …}`"
    )


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown
