import json
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest

from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.specs import DimRange, InputSpec, TensorSpec, ValueRange
from trtforge.runtime.tensors import load_tensors, save_tensors
from trtforge.validation.golden import (
    INPUTS_FILE,
    OUTPUTS_FILE,
    GoldenSet,
    load_outputs,
    plan_points,
    record,
    run_samples,
    sizes_of,
)

PROFILE = {"batch": DimRange(1, 4, 8)}
INPUTS = (
    InputSpec("x/in", "float32", ("batch", 3)),
    InputSpec("half", "bfloat16", ("batch", 2)),
    InputSpec("ids", "int64", ("batch",), ValueRange(0, 9)),
    InputSpec("mask", "bool", ("batch",)),
)


@dataclass
class Doubler:
    name: str = "fake"
    version: str = "1.0"
    inputs: tuple[TensorSpec, ...] = INPUTS
    outputs: tuple[TensorSpec, ...] = ()
    seen: list[dict] = field(default_factory=list)

    def run(self, feeds):
        self.seen.append(dict(feeds))
        return {
            "out/y": feeds["x/in"] * 2,
            "half": feeds["half"] + feeds["half"],
            "ids": feeds["ids"] * 2,
            "scalar": np.float32(feeds["x/in"].sum()).reshape(()),
        }


def assert_same(a: GoldenSet, b: GoldenSet) -> None:
    assert (a.runner, a.version, len(a.samples)) == (b.runner, b.version, len(b.samples))
    for left, right in zip(a.samples, b.samples, strict=True):
        assert (left.name, left.sizes, left.seed) == (right.name, right.sizes, right.seed)
        for one, other in ((left.inputs, right.inputs), (left.outputs, right.outputs)):
            assert list(one) == list(other), "in the recorded order"
            for name in one:
                assert one[name].dtype == other[name].dtype
                np.testing.assert_array_equal(one[name], other[name])


def test_points_of_one_profile():
    points = plan_points([PROFILE], repeats=2)
    assert [(p.name, p.sizes["batch"], p.required) for p in points] == [
        ("opt", 4, True), ("min", 1, True), ("max", 8, True), ("opt-2", 4, False), ("opt-3", 4, False),
    ]  # fmt: skip
    assert len({p.seed for p in points}) == len(points)


def test_extreme_points_are_the_largest_of_each_profile():
    points = plan_points([PROFILE, {"batch": DimRange(2, 3, 5)}], repeats=1, extremes=True)
    assert [(p.name, p.sizes["batch"]) for p in points if p.extreme] == [("0.extreme", 8), ("1.extreme", 5)]
    assert len({p.seed for p in points}) == len(points)
    assert not any(p.extreme for p in plan_points([PROFILE]))


def test_extremes_where_the_reference_is_not_finite_are_left_out():
    spec = InputSpec("x", "float32", ("batch", 3), ValueRange(0, 1))

    class Inverse(Doubler):
        def run(self, feeds):
            with np.errstate(divide="ignore"):
                return {"y": 1 / feeds["x"]}

    points = plan_points([PROFILE], extremes=True)
    assert "extreme" in [s.name for s in record(Doubled(), [spec], points).samples]
    assert "extreme" not in [s.name for s in record(Inverse(), [spec], points).samples]


class Doubled(Doubler):
    def run(self, feeds):
        return {"y": feeds["x"] * 2}


def test_points_that_coincide_are_recorded_once():
    names = [p.name for p in plan_points([{"n": DimRange(1, 2, 2)}, {"n": DimRange(2, 2, 4)}], repeats=1)]
    assert names == ["0.opt", "0.min", "1.max", "0.opt-2"]


@pytest.mark.parametrize("profiles", [[], [{}]])
def test_fixed_shapes(profiles):
    assert [p.name for p in plan_points(profiles, repeats=1)] == ["opt", "opt-2"]


def test_round_trip(tmp_path):
    golden = record(Doubler(), INPUTS, plan_points([PROFILE]))
    golden.save(tmp_path / "proof")
    assert sorted(p.name for p in (tmp_path / "proof").iterdir()) == [INPUTS_FILE, OUTPUTS_FILE]
    assert_same(GoldenSet.load(tmp_path / "proof"), golden)
    assert golden.samples[0].inputs["half"].dtype == ml_dtypes.bfloat16


def test_equal_sets_give_equal_bytes(tmp_path):
    for folder in ("a", "b"):
        record(Doubler(), INPUTS, plan_points([PROFILE])).save(tmp_path / folder)
    for name in (INPUTS_FILE, OUTPUTS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_model_without_inputs(tmp_path):
    class Constant(Doubler):
        def run(self, feeds):
            return {"y": np.ones(3, np.float32)}

    golden = record(Constant(), (), plan_points([]))
    golden.save(tmp_path)
    assert_same(GoldenSet.load(tmp_path), golden)


def test_real_inputs_are_recorded_with_their_sizes():
    points = plan_points([PROFILE], repeats=0)
    real = [record(Doubler(), INPUTS, points).samples[2].inputs]
    golden = record(Doubler(), INPUTS, points, real=real)
    assert [(s.name, s.seed, s.sizes["batch"]) for s in golden.samples][-1] == ("real-1", None, 8)


def test_byte_limit_drops_repetitions_never_points():
    points = plan_points([PROFILE], repeats=5)
    real = [record(Doubler(), INPUTS, points).samples[0].inputs] * 3
    golden = record(Doubler(), INPUTS, points, real=real, byte_limit=1)
    assert [s.name for s in golden.samples] == ["opt", "min", "max", "real-1"]


def test_byte_limit_leaves_two_samples():
    golden = record(Doubler(), INPUTS, plan_points([{"batch": DimRange(2, 2, 2)}]), byte_limit=1)
    assert [s.name for s in golden.samples] == ["opt", "opt-2"]


def test_on_sample_names_each_before_it_runs():
    seen = []
    real = (sample.inputs for sample in record(Doubler(), INPUTS, plan_points([PROFILE])).samples[:1])
    record(Doubler(), INPUTS, plan_points([PROFILE]), real=real, on_sample=seen.append)
    assert seen == ["opt", "min", "max", "real-1", "opt-2", "opt-3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("mask"), "has the inputs"),
        (lambda f: f.update(extra=f["mask"]), "has the inputs"),
        (lambda f: f.update(ids=f["ids"].astype(np.int32)), "'ids' is int32, the model takes int64"),
        (lambda f: f.update({"x/in": f["x/in"][:, :2]}), r"shape \[4, 2\], the model takes \['batch', 3\]"),
        (lambda f: f.update(ids=f["ids"][:3]), r"(?s)shape \[3\], .*with batch = 4"),
        (lambda f: f.update(ids=f["ids"][None]), r"shape \[1, 4\]"),
    ],
)
def test_real_inputs_that_do_not_fit(change, message):
    feeds = dict(record(Doubler(), INPUTS, plan_points([PROFILE])).samples[0].inputs)
    change(feeds)
    with pytest.raises(ConfigError, match=message):
        sizes_of(INPUTS, feeds)


def test_run_samples_casts_floating_inputs_to_what_the_runner_takes():
    golden = record(Doubler(), INPUTS, plan_points([PROFILE]))
    runner = Doubler(inputs=(TensorSpec("x/in", "float16", ("batch", 3)), TensorSpec("ids", "int32", ("batch",))))
    outputs = run_samples(golden, runner)
    assert list(outputs) == [s.name for s in golden.samples]
    assert runner.seen[0]["x/in"].dtype == np.float16
    assert runner.seen[0]["ids"].dtype == np.int64, "an integer type that differs is the runner's to refuse"


def test_load_outputs_of_a_child(tmp_path):
    save_tensors(tmp_path / "o.safetensors", {"opt/a/b": np.ones(2, np.float32)})
    assert list(load_outputs(tmp_path / "o.safetensors")["opt"]) == ["a/b"]
    save_tensors(tmp_path / "o.safetensors", {"a": np.ones(2, np.float32)})
    with pytest.raises(ArtifactError, match="not named <sample>/<tensor>"):
        load_outputs(tmp_path / "o.safetensors")


def rewrite(folder, name, edit):
    tensors, metadata = load_tensors(folder / name)
    data = json.loads(metadata["golden"])
    edit(tensors, data)
    save_tensors(folder / name, tensors, {"golden": json.dumps(data)})


def edit_both(folder, edit):
    for name in (INPUTS_FILE, OUTPUTS_FILE):
        rewrite(folder, name, edit)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / INPUTS_FILE).unlink(), "cannot read"),
        (lambda d: (d / INPUTS_FILE).write_bytes(b"\0" * 40), "cannot read"),
        (lambda d: rewrite(d, OUTPUTS_FILE, lambda t, m: m.update(version="2")), "different golden sets"),
        (lambda d: edit_both(d, lambda t, m: m.update(schema=2)), "has schema 2"),
        (lambda d: rewrite(d, OUTPUTS_FILE, lambda t, m: t.pop("opt/ids")), "damaged.*ids"),
        (lambda d: edit_both(d, lambda t, m: m["samples"][0]["outputs"].update(ids="int32")), "recorded as int32"),
        (lambda d: edit_both(d, lambda t, m: m.pop("samples")), "damaged.*samples"),
    ],
)
def test_damaged_sets_are_refused(tmp_path, damage, message):
    record(Doubler(), INPUTS, plan_points([PROFILE])).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        GoldenSet.load(tmp_path)
