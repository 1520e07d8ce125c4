import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtforge.runtime.errors import ArtifactError, ParityError
from trtforge.validation.compare import compare
from trtforge.validation.golden import GoldenSet, Sample
from trtforge.validation.parity import Candidate, ParityReport, Verdict, worst_verdict
from trtforge.validation.tolerance import DEFAULTS, Tolerance

CANDIDATE = Candidate("precision", "onnxruntime", "1.0", "fp16", {"graph": "ab12"}, "a note")
FP16 = DEFAULTS["fp16"]


def golden_of(*outputs, inputs=None):
    """A golden set with one sample per mapping of outputs, each with an input of its own."""
    feeds = inputs or [{"x": np.full((2, 2), float(i), np.float32)} for i in range(len(outputs))]
    samples = [Sample(f"s{i}", {}, i, feeds[i], out) for i, out in enumerate(outputs)]
    return GoldenSet(tuple(samples), "torch", "2.0")


def noise(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape or (4, 10)).astype(dtype)


def answers(golden, change=lambda array: array):
    return {s.name: {name: change(a.copy()) for name, a in s.outputs.items()} for s in golden.samples}


def check(golden, outputs=None, tolerance=FP16, candidate=CANDIDATE, **options):
    return compare(golden, answers(golden) if outputs is None else outputs, tolerance, candidate, **options)


TWO = golden_of({"y": noise(0)}, {"y": noise(1)})


def test_equal_passes():
    report = check(TWO)
    assert report.passed
    assert report.reasons == ()
    assert report.fix == ""
    assert report.reference == "torch 2.0"
    assert report.samples == ("s0", "s1")
    assert report.notes == ("a note",)
    report.raise_unless_passed()


def test_rounding_passes_and_is_measured():
    report = check(TWO, answers(TWO, lambda a: a.astype(np.float16).astype(np.float32)))
    assert report.passed
    (output,) = report.outputs
    assert 70 < output.pooled.sqnr_db < 80
    assert [s.sample for s in output.samples] == ["s0", "s1"]


def lacking(outputs, sample, name):
    outputs = {key: dict(value) for key, value in outputs.items()}
    del outputs[sample][name]
    return outputs


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [
        ({}, "the candidate has 0 of 2 samples, without s0, s1"),
        ({"s0": answers(TWO)["s0"]}, "the candidate has 1 of 2 samples, without s1"),
        ({**answers(TWO), "s9": {}}, "samples that the golden set lacks: s9"),
        (lacking(answers(TWO), "s1", "y"), "the candidate lacks the output 'y' (in s1)"),
        ({k: {**v, "z": v["y"]} for k, v in answers(TWO).items()}, "lacks the candidate's output 'z' (in s0, s1)"),
        (
            answers(TWO, lambda a: a[:, :5]),
            "'y': its shape is [4, 5], the reference's is [4, 10], in sample 's0'",
        ),
        (answers(TWO, lambda a: a.reshape(10, 4)), "output 'y': its shape is [10, 4]"),
        (answers(TWO, lambda a: a[None]), "output 'y': its shape is [1, 4, 10]"),
        (answers(TWO, lambda a: a.astype(np.float64)), "output 'y': it is float64, float32 was expected"),
    ],
)
def test_structure_fails_before_figures(outputs, sentence):
    report = check(TWO, outputs)
    assert report.verdict is Verdict.FAILED
    assert any(sentence in reason for reason in report.reasons), report.reasons
    assert report.fix


def test_dtype_that_the_plan_changed_is_expected():
    halves = answers(TWO, lambda a: a.astype(np.float16))
    assert check(TWO, halves, dtypes={"y": "float16"}).passed
    assert not check(TWO, dtypes={"y": "float16"}).passed


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_fails_even_where_both_have_it(bad):
    def spoil(array):
        array[0, 0] = bad
        return array

    only_candidate = check(TWO, answers(TWO, spoil))
    assert only_candidate.verdict is Verdict.FAILED
    assert "1 of 40 values are NaN or Inf in sample 's0'" in only_candidate.reasons[0]
    assert "65504" in only_candidate.fix
    spoiled = golden_of(*answers(TWO, spoil).values())
    both = check(spoiled)
    assert both.verdict is Verdict.FAILED
    assert "the reference itself holds 1 NaN or Inf" in both.reasons[0]


def test_one_sample_wrong_is_found_and_named():
    golden = golden_of(*({"y": noise(i, 64, 100)} for i in range(3)), {"y": noise(3, 1, 100)})
    outputs = answers(golden)
    outputs["s3"]["y"] = outputs["s3"]["y"][:, ::-1]
    report = check(golden, outputs, tolerance=Tolerance(sqnr_db=15))
    assert report.verdict is Verdict.FAILED
    assert "in sample 's3'" in report.reasons[0]
    assert report.outputs[0].worst.sample == "s3"


def test_elementwise_limits():
    nearly = answers(TWO, lambda a: a + np.float32(1e-3))
    assert check(TWO, nearly).passed
    assert "beyond atol 0.0001" in check(TWO, nearly, tolerance=replace(FP16, atol=1e-4)).reasons[0]


def test_value_near_zero_in_a_small_sample_does_not_fail():
    """A regression model's only value may happen to be tiny: it is held against the output's scale."""
    golden = golden_of({"y": np.array([[1e-6]], np.float32)}, {"y": np.array([[2.0]], np.float32)})
    assert check(golden, answers(golden, lambda a: a + np.float32(1e-4))).passed


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [
        ([], "the reference has no samples"),
        ([{}, {}], "the reference has no outputs"),
        ([{"y": np.zeros((0, 3), np.float32)}] * 2, "it is empty in every sample"),
        ([{"y": np.zeros((2, 3), np.float32)}] * 2, "the reference is 0 everywhere"),
        ([{"y": np.full((2, 3), 0.5, np.float32)}] * 2, "the reference is 0.5 everywhere"),
        ([{"y": noise(0)}], "no two samples with different inputs"),
        ([{"y": noise(0)}] * 3, "the same whatever the input"),
        ([{"y": np.zeros(3, np.int64)}] * 2, "the reference is 0 everywhere"),
    ],
)
def test_vacuous_is_not_proved(outputs, sentence):
    report = check(golden_of(*outputs))
    assert report.verdict is Verdict.NOT_PROVED
    assert sentence in report.reasons[0]
    assert report.fix
    with pytest.raises(ParityError, match="is not proved equal"):
        report.raise_unless_passed()


def test_vacuous_and_different_is_failed():
    golden = golden_of(*[{"y": np.zeros((2, 3), np.float32)}] * 2)
    assert check(golden, answers(golden, lambda a: a + 1)).verdict is Verdict.FAILED


def test_same_inputs_show_no_dependence():
    same = [{"x": np.ones(3, np.float32)}] * 2
    assert check(golden_of({"y": noise(0)}, {"y": noise(1)}, inputs=same)).verdict is Verdict.NOT_PROVED


def test_bias_that_is_broadcast_over_other_batches_is_not_proved():
    """A zero-initialised head gives its bias for every image: not constant, of several shapes, yet vacuous."""
    bias = noise(0, 1, 10)
    golden = golden_of(*({"y": np.repeat(bias, n, 0)} for n in (1, 4, 8)))
    report = check(golden)
    assert report.verdict is Verdict.NOT_PROVED
    assert "the same whatever the input" in report.reasons[0]


def test_output_that_follows_sizes_alone_is_not_proved():
    grid = [np.linspace(0, 1, n, dtype=np.float32) for n in (4, 4, 8)]
    assert check(golden_of(*({"y": a} for a in grid))).verdict is Verdict.NOT_PROVED


def test_answer_to_another_input_is_not_proved_however_close():
    """What a random ResNet-50 does: any two inputs' outputs are alike to 35 dB, more than the tolerance asks."""
    common = noise(0, 4, 200)
    golden = golden_of(*({"y": common + np.float32(0.01) * noise(i, 4, 200)} for i in (1, 2, 3)))
    names = [s.name for s in golden.samples]
    stale = {name: golden.samples[(i + 1) % 3].outputs for i, name in enumerate(names)}
    report = check(golden, stale)
    assert report.outputs[0].pooled.sqnr_db > 35, "the tolerance alone would let it pass"
    assert report.verdict is Verdict.NOT_PROVED
    assert "nearly as far apart" in report.reasons[0]
    assert check(golden).passed


def test_constant_mask_passes_beside_a_proved_output():
    mask = np.ones(4, bool)
    golden = golden_of(*({"y": noise(i), "mask": mask} for i in range(2)))
    report = check(golden)
    assert report.passed
    assert any("'mask'" in note and "says little" in note for note in report.notes)
    wrong = answers(golden)
    wrong["s1"]["mask"][0] = False
    assert check(golden, wrong).reasons[0] == "output 'mask': 1 of 8 values differ, none may, over all samples"


def test_constant_float_output_is_not_proved_unless_fixed():
    anchors = noise(9, 5, 4)
    golden = golden_of(*({"y": noise(i), "anchors": anchors} for i in range(2)))
    assert check(golden).verdict is Verdict.NOT_PROVED
    assert check(golden, fixed_outputs=["anchors"]).passed
    assert not check(golden, answers(golden, lambda a: a + 1), fixed_outputs=["anchors"]).passed


def test_fixed_outputs_alone_prove_nothing():
    golden = golden_of(*[{"anchors": noise(9, 5, 4)}] * 2)
    assert check(golden, fixed_outputs=["anchors"]).verdict is Verdict.NOT_PROVED


def test_empty_output_is_never_excused():
    golden = golden_of(*({"y": noise(i), "boxes": np.zeros((0, 4), np.int64)} for i in range(2)))
    assert check(golden, fixed_outputs=["boxes"]).verdict is Verdict.NOT_PROVED


def test_error_names_what_why_and_fix():
    with pytest.raises(ParityError) as caught:
        check(TWO, answers(TWO, lambda a: a[:, ::-1])).raise_unless_passed()
    error = caught.value
    assert "(fp16 on onnxruntime 1.0) does not equal torch 2.0" in error.what
    assert "output 'y': SQNR is" in error.why
    assert "validation: {tolerance: …}" in error.fix
    assert error.exit_code == 4


def test_long_lists_are_cut():
    golden = golden_of(*({f"y{i}": noise(n * 20 + i) for i in range(9)} for n in range(2)))
    with pytest.raises(ParityError, match=r"and \d+ more"):
        check(golden, answers(golden, np.negative)).raise_unless_passed()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["same", "noise", "nan", "shape", "lost", "zero"]), st.booleans())
def test_json_round_trip(seed, kind, two):
    golden = golden_of(*({"y": noise(seed + i), "n": np.arange(3) + i} for i in range(1 + two)))
    changes = {
        "same": lambda a: a,
        "noise": lambda a: (a + noise(seed, *a.shape)).astype(a.dtype),
        "nan": lambda a: np.full_like(a, np.nan) if a.dtype.kind == "f" else a,
        "shape": lambda a: a[:1],
        "zero": np.zeros_like,
    }
    outputs = {} if kind == "lost" else answers(golden, changes[kind])
    report = check(golden, outputs)
    assert ParityReport.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(schema=9), "has schema 9"),
        (lambda d: d.pop("outputs"), "damaged"),
        (lambda d: d.update(verdict="great"), "damaged"),
        (lambda d: d.update(outputs=None), "damaged"),
    ],
)
def test_damaged_json_is_refused(edit, message):
    data = check(TWO).to_json()
    edit(data)
    with pytest.raises(ArtifactError, match=message):
        ParityReport.from_json(data)


def test_worst_verdict():
    assert worst_verdict() is Verdict.NOT_PROVED
    assert worst_verdict(Verdict.PASSED) is Verdict.PASSED
    assert worst_verdict(Verdict.PASSED, Verdict.NOT_PROVED) is Verdict.NOT_PROVED
    assert worst_verdict(Verdict.NOT_PROVED, Verdict.FAILED) is Verdict.FAILED
