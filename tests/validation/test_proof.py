import json
from dataclasses import replace

import numpy as np
import pytest

from trtforge.runtime.errors import ArtifactError, ParityError
from trtforge.validation.compare import compare
from trtforge.validation.golden import GoldenSet, Sample
from trtforge.validation.parity import Candidate, Verdict
from trtforge.validation.proof import Proof
from trtforge.validation.tolerance import DEFAULTS

_RUNNERS = {"export": "onnxruntime", "precision": "onnxruntime", "engine": "tensorrt-rtx"}
_OUTPUTS = [np.random.default_rng(i).standard_normal((4, 50)).astype(np.float32) for i in range(2)]
_GOLDEN = GoldenSet(
    tuple(Sample(f"s{i}", {}, i, {"x": np.full(2, i)}, {"y": y}) for i, y in enumerate(_OUTPUTS)), "torch", "2"
)


def report(stage, error=1e-4, golden=_GOLDEN):
    """A report of a stage whose error is `error` standard deviations; fp16's limits are met below 0.03."""
    rng = np.random.default_rng(7)
    outputs = {
        s.name: {"y": (s.outputs["y"] + error * rng.standard_normal(s.outputs["y"].shape)).astype(np.float32)}
        for s in golden.samples
    }
    precision = "fp32" if stage == "export" else "fp16"
    return compare(golden, outputs, DEFAULTS["fp16"], Candidate(stage, _RUNNERS[stage], "1", precision, {}))


GOOD, BAD = 1e-4, 1.0


@pytest.mark.parametrize(
    ("errors", "verdict", "blame"),
    [
        ({"export": GOOD}, "passed", ""),
        ({"export": GOOD, "precision": GOOD, "engine": GOOD}, "passed", ""),
        ({"export": BAD}, "failed", "The export is to blame"),
        ({"export": BAD, "precision": GOOD, "engine": GOOD}, "failed", "The export is to blame"),
        ({"export": GOOD, "precision": BAD}, "failed", "The precision plan is to blame"),
        ({"export": GOOD, "precision": BAD, "engine": BAD}, "failed", "The precision plan is to blame"),
        ({"export": GOOD, "precision": GOOD, "engine": BAD}, "failed", "TensorRT's build is to blame"),
        ({"export": GOOD, "engine": BAD}, "failed", "TensorRT's build is to blame"),
        ({"engine": BAD}, "failed", "the step to blame is not known"),
        ({"export": GOOD, "precision": BAD, "engine": GOOD}, "passed", ""),
        ({}, "not_proved", "nothing was compared for: export"),
        ({"engine": GOOD}, "not_proved", "nothing was compared for: export"),
    ],
)
def test_verdict_and_blame(errors, verdict, blame):
    proof = Proof(tuple(report(stage, error) for stage, error in errors.items()))
    assert proof.verdict.value == verdict
    assert blame in proof.blame
    assert bool(proof.blame) == (not proof.passed)
    if proof.passed:
        proof.raise_unless_passed()
    else:
        with pytest.raises(ParityError) as caught:
            proof.raise_unless_passed()
        assert proof.blame in caught.value.why
        assert caught.value.fix


def test_required_stage_that_is_missing_is_not_proved():
    proof = Proof((report("export"),), required=("export", "precision"))
    assert proof.verdict is Verdict.NOT_PROVED
    assert proof.missing == ("precision",)
    assert replace(proof, reports=(*proof.reports, report("engine"))).passed


def test_vacuous_stage_is_not_proved():
    zeros = GoldenSet(
        tuple(replace(s, outputs={"y": np.zeros((4, 50), np.float32)}) for s in _GOLDEN.samples), "torch", "2"
    )
    proof = Proof((report("export", 0.0, zeros),))
    assert proof.verdict is Verdict.NOT_PROVED
    with pytest.raises(ParityError, match="not proved equal"):
        proof.raise_unless_passed()


def test_two_reports_of_a_stage_are_a_bug():
    with pytest.raises(ValueError, match="two reports"):
        Proof((report("export"), report("export")))


def test_engine_that_passes_but_errs_far_more_than_onnxruntime_is_noted():
    chain = (report("export"), report("precision", 1e-4), report("engine", 0.02))
    (note,) = Proof(chain).all_notes
    assert "look whether the build went astray" in note
    assert Proof((report("export"), report("precision", 1e-4), report("engine", 2e-4))).all_notes == ()


def test_emulation_that_fails_where_the_engine_passes_is_noted():
    proof = Proof((report("export"), report("precision", BAD), report("engine", GOOD)), notes=("mine",))
    assert proof.all_notes == ("mine", "onnxruntime on model.onnx did not pass where the engine did")


def test_json_round_trip():
    proof = Proof((report("export"), report("precision", BAD)), ("export", "precision"), ("a note",))
    data = json.loads(json.dumps(proof.to_json(), allow_nan=False))
    assert Proof.from_json(data) == proof
    assert (data["verdict"], data["blame"]) == ("failed", proof.blame)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(schema=2), "has schema 2"),
        (lambda d: d.update(verdict="passed"), "says passed, its comparisons say failed"),
        (lambda d: d["reports"].pop(), "says failed, its comparisons say passed"),
        (lambda d: d.pop("reports"), "damaged"),
        (lambda d: d["reports"].append(d["reports"][0]), "damaged"),
    ],
)
def test_edited_json_is_refused(edit, message):
    data = Proof((report("export"), report("precision", BAD))).to_json()
    edit(data)
    with pytest.raises(ArtifactError, match=message):
        Proof.from_json(data)
