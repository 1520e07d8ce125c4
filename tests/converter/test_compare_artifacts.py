"""What counts as worse, and which change is named as the cause."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtforge.converter.baseline import read_baseline, write_baseline
from trtforge.converter.compare_artifacts import Allowance, compare_records, format_rows
from trtforge.converter.record import ArtifactRecord, Figures, StageRecord
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.graph import graph_hash


def stage(sqnr=60.0, cosine=0.9999995, error=0.003, verdict="passed", runner="onnxruntime 1.32.0"):
    return StageRecord(runner, verdict, {"y": Figures(sqnr, cosine, error), "n": Figures(mismatch=0.0)})


OLD = ArtifactRecord(
    precision="fp16",
    plan=("op: Softmax, precision: fp32",),
    proof={"export": stage(130.0, 1.0, 1e-6), "precision": stage(), "engine": stage(59.0, runner="tensorrt-rtx 1.6")},
    tolerance={"sqnr_db": 30.0, "cosine": 0.999, "max_abs_over_std": 0.2, "atol": None, "rtol": None, "mismatch": 0.0},
    hashes={"structure": "s1", "weights": "w1", "checkpoint": "c1", "inputs": "i1"},
    operators={"Conv": 3, "Relu": 3},
    versions={"torch": "2.14", "tensorrt-rtx": "1.6"},
    device="NVIDIA H100 (9.0)",
    sizes={"model.onnx": 100, "model.engine": 200},
)


def worse(record=OLD, *, at="precision", **figures):
    return replace(record, proof={**record.proof, at: stage(**{"sqnr": 40.0, "error": 0.03, **figures})})


def hashes(**changed):
    return {**OLD.hashes, **changed}


def test_same_is_same():
    found = compare_records(OLD, OLD)
    assert (found.regressions, found.changes, found.causes, found.sizes) == ((), (), (), {})
    assert found.to_json()["verdict"] == "same"


@pytest.mark.parametrize(
    ("new", "kind"),
    [
        (worse(replace(OLD, hashes=hashes(weights="w2", checkpoint="c2"))), "weights"),
        (worse(replace(OLD, hashes=hashes(weights="w2"))), "weights"),
        (worse(replace(OLD, hashes=hashes(structure="s2", weights="w2"), operators={"Conv": 4, "Relu": 3})), "graph"),
        (worse(replace(OLD, hashes=hashes(calibration="d2"))), "calibration"),
        (worse(replace(OLD, hashes=hashes(inputs="i2"))), "inputs"),
        (worse(replace(OLD, plan=())), "plan"),
        (worse(replace(OLD, precision="bf16")), "plan"),
        (worse(replace(OLD, versions={**OLD.versions, "torch": "2.15"})), "version"),
        (worse(OLD), "noise"),
        # TensorRT cannot touch what onnxruntime ran
        (worse(replace(OLD, versions={**OLD.versions, "tensorrt-rtx": "1.7"})), "noise"),
        (worse(replace(OLD, versions={**OLD.versions, "tensorrt-rtx": "1.7"}), at="engine"), "tensorrt"),
        (worse(replace(OLD, device="NVIDIA L4 (8.9)"), at="engine"), "device"),
        (worse(replace(OLD, plan=()), at="export"), "noise"),
        (replace(OLD, tolerance={**OLD.tolerance, "sqnr_db": 10.0}), "tolerance"),
    ],
)
def test_likely_cause(new, kind):
    found = compare_records(OLD, new)
    assert found.regressions
    assert found.causes[0].kind == kind


def test_stage_decides_between_causes():
    both = replace(OLD, versions={**OLD.versions, "tensorrt-rtx": "1.7"}, hashes=hashes(weights="w2"))
    assert [c.kind for c in compare_records(OLD, worse(both, at="engine")).causes] == ["tensorrt", "weights"]
    assert [c.kind for c in compare_records(OLD, worse(both)).causes] == ["weights"]


def test_checkpoint_saved_again_is_no_change():
    assert compare_records(OLD, replace(OLD, hashes=hashes(checkpoint="c2"))).changes == ()


def test_graph_change_names_operators():
    new = replace(OLD, hashes=hashes(structure="s2", weights="w2"), operators={"Conv": 3, "Tanh": 3})
    (change,) = compare_records(OLD, new).changes
    assert "Relu 3 -> 0, Tanh 0 -> 3" in change.text


@pytest.mark.parametrize(
    ("new", "regression"),
    [
        (stage(57.1), False),
        (stage(56.9), True),
        (stage(error=0.0059), False),
        (stage(error=0.0061), True),
        (stage(cosine=0.9999), True),
        (replace(stage(), outputs={**stage().outputs, "n": Figures(mismatch=0.01)}), True),
        (replace(stage(), outputs={**stage().outputs, "n": stage().outputs["y"]}), True),
        (stage(verdict="failed"), True),
        (stage(verdict="not_proved"), True),
        (stage(math.nan), True),
        (stage(-math.inf), True),
        (stage(math.inf, 1.0, 0.0), False),
        (StageRecord("onnxruntime 1.32.0", "passed", {}), True),
    ],
)
def test_what_is_worse(new, regression):
    found = compare_records(OLD, replace(OLD, proof={**OLD.proof, "precision": new}))
    assert bool(found.regressions) == regression


@pytest.mark.parametrize(("new", "regression"), [(90.0, False), (87.1, False), (86.0, True)])
def test_float32_moves_freely_above_the_ceiling(new, regression):
    found = compare_records(OLD, replace(OLD, proof={**OLD.proof, "export": stage(new, 1.0, 1e-4)}))
    assert bool(found.regressions) == regression


def test_stage_of_one_side_is_not_compared():
    without = replace(OLD, proof={"export": OLD.proof["export"]})
    assert not compare_records(OLD, without).regressions
    assert not compare_records(without, OLD).regressions


def test_stricter_tolerance_is_no_regression():
    assert not compare_records(OLD, replace(OLD, tolerance={**OLD.tolerance, "sqnr_db": 50.0})).regressions
    assert compare_records(OLD, replace(OLD, tolerance={**OLD.tolerance, "sqnr_db": None})).regressions
    assert not compare_records(OLD, replace(OLD, tolerance={**OLD.tolerance, "rtol": 0.1})).regressions


figures = st.builds(Figures, st.floats(-20, 160), st.floats(-1, 1), st.floats(0, 10)) | st.builds(
    Figures, mismatch=st.just(0.0) | st.floats(0.001, 1)
)


@given(figures)
def test_nothing_is_worse_than_itself_as_recorded(one):
    record = replace(OLD, proof={"precision": StageRecord("r", "passed", {"y": one})})
    kept = ArtifactRecord.from_json(json.loads(json.dumps(record.to_json())))
    assert not compare_records(kept, record).regressions
    assert not compare_records(kept, record, Allowance(sqnr_drop_db=0, growth=1)).regressions
    assert ArtifactRecord.from_json(kept.to_json()) == kept


@given(figures, st.floats(0.1, 40), st.floats(1.1, 100))
def test_more_allowance_never_makes_a_regression(one, drop, growth):
    old = replace(OLD, proof={"precision": stage()})
    new = replace(OLD, proof={"precision": StageRecord("r", "passed", {"y": one})})
    tight = compare_records(old, new, Allowance(drop, growth=growth))
    loose = compare_records(old, new, Allowance(drop + 1, growth=growth * 1.1))
    assert len(loose.regressions) <= len(tight.regressions)


def test_table_is_aligned_and_marks():
    lines = format_rows(compare_records(OLD, worse()).rows)
    assert lines[0].split() == ["stage", "output", "measure", "old", "new", "allowed"]
    marked = [line for line in lines if line.endswith("<-- worse")]
    assert any("SQNR dB" in line and ">= 57.0" in line for line in marked)


def test_baseline_keeps_other_entries_and_the_gpus_figures(tmp_path: Path):
    path = tmp_path / "deep" / "baseline.json"
    assert write_baseline(path, {"b": OLD, "a": OLD}) == ("b", "a")
    assert list(json.loads(path.read_text())["engines"]) == ["a", "b"]
    without_gpu = replace(OLD, proof={k: v for k, v in OLD.proof.items() if k != "engine"}, device="")
    before = path.read_bytes()
    assert write_baseline(path, {"a": without_gpu}) == ()
    assert path.read_bytes() == before
    moved = replace(without_gpu, hashes=hashes(weights="w2"))
    assert write_baseline(path, {"a": moved}) == ("a",)
    found = read_baseline(path)
    assert "engine" not in found["a"].proof
    assert found["b"] == ArtifactRecord.from_json(OLD.to_json())
    assert [p.name for p in path.parent.iterdir()] == ["baseline.json"]


def test_update_is_quiet_about_noise_alone(tmp_path: Path):
    path = tmp_path / "baseline.json"
    write_baseline(path, {"a": OLD})
    assert write_baseline(path, {"a": replace(OLD, proof={**OLD.proof, "precision": stage(60.2, error=0.0031)})}) == ()
    assert write_baseline(path, {"a": replace(OLD, proof={**OLD.proof, "precision": stage(61.0)})}) == ("a",)
    assert write_baseline(path, {"a": replace(OLD, proof={**OLD.proof, "precision": stage(61.0, error=0.02)})}) == (
        "a",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not JSON"),
        ("{\n<<<<<<< HEAD\n", "merge conflict"),
        ("[]", "no object `engines`"),
        ('{"schema": 9, "engines": {}}', "schema 9"),
        ('{"schema": 1, "engines": {"a": {}}}', "entry 'a' is damaged"),
        ('{"schema": 1, "engines": {"a": 3}}', "entry 'a' is damaged"),
    ],
)
def test_broken_baseline_is_a_clear_error(tmp_path: Path, text, words):
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_baseline(path)
    assert "--engine-baseline=update" in caught.value.fix


def small_graph(scale: float, axis: int, op: str = "Relu"):
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 4] x) => (float[n, 4] y) <float[1] w = {{{scale}}}, int64[1] axes = {{{axis}}}> {{
            a = Mul (x, w)
            b = ReduceMean (a, axes)
            c = Sub (a, b)
            y = {op} (c)
        }}"""
    )


def test_structure_is_the_graph_without_its_weights():
    one, other = small_graph(1.0, 1), small_graph(2.0, 1)
    assert graph_hash(one) != graph_hash(other)
    assert graph_hash(one, weights=False) == graph_hash(other, weights=False)
    for changed in (small_graph(1.0, 0), small_graph(1.0, 1, "Tanh")):
        assert graph_hash(one, weights=False) != graph_hash(changed, weights=False)


def test_baseline_of_schema_1_is_read():
    """A file as users have it committed: every later trtforge reads it, or says that it does not."""
    path = Path(__file__).parent / "data" / "baseline-1.json"
    (found,) = read_baseline(path).values()
    assert found == ArtifactRecord.from_json(OLD.to_json())
