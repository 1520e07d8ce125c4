"""What an engine's caller sees, over the fake at the one seam; tests/gpu/test_engine_torch.py has real ones."""

from __future__ import annotations

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest
import torch
from fake_session import FakeSession

from trtforge.runtime.engine import Engine
from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.feeds import choose_profile, fetch_tensor, torch_dtype
from trtforge.runtime.layer_times import LayerTimes
from trtforge.runtime.specs import TensorSpec

CPU = torch.device("cpu")


def _engine(session: FakeSession | None = None, **limits: int) -> Engine:
    return Engine.over(session or FakeSession(), CPU, lambda: 7, **limits)


def _x(batch: int, *tail: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, *(tail or (4,)), generator=torch.Generator().manual_seed(seed))


def test_one_output_is_the_tensor_and_several_are_a_dict_by_name():
    x = _x(2)
    assert torch.equal(_engine()(x), 2 * x + 1)
    both = _engine(FakeSession(outputs=2))(x=x)
    assert list(both) == ["y", "z"]
    assert torch.equal(both["y"], 2 * x + 1)
    torch.testing.assert_close(both["z"], x.sum(1))


def test_run_takes_and_gives_names_always():
    x = _x(2)
    out = _engine().run({"x": x})
    assert list(out) == ["y"]
    assert torch.equal(out["y"], 2 * x + 1)


def test_no_later_call_overwrites_an_output():
    engine = _engine()
    kept = [(x, engine(x)) for x in (_x(batch, seed=n) for n, batch in enumerate([2, 2, 2, 2, 1, 8, 2, 8, 1, 1]))]
    for x, y in kept:
        assert torch.equal(y, 2 * x + 1)


def test_shapes_that_come_back_are_captured_and_then_replayed():
    session = FakeSession()
    engine = _engine(session)
    for calls, (runs, captures, launches) in enumerate([(1, 0, 0), (2, 1, 0), (2, 1, 1), (2, 1, 2)], 1):
        engine(_x(2))
        assert (session.runs, session.captures, session.launches) == (runs, captures, launches), calls
    assert engine.graphs == 1


def test_without_graphs_every_call_runs():
    session = FakeSession()
    engine = _engine(session, graphs=0)
    x = _x(2)
    for _ in range(4):
        assert torch.equal(engine(x), 2 * x + 1)
    assert (session.runs, session.captures) == (4, 0)
    assert not engine.bind(x).captured


def test_what_cannot_be_captured_still_runs():
    session = FakeSession()
    session.capturable = False
    engine = _engine(session)
    x = _x(2)
    for _ in range(4):
        assert torch.equal(engine(x), 2 * x + 1)
    bound = engine.bind(x)
    x.fill_(3)
    assert not bound.captured
    assert torch.equal(bound(), torch.full((2, 4), 7.0))


def test_the_graphs_used_longest_ago_go_first():
    session = FakeSession(profiles=((1, 2, 8),))
    engine = _engine(session, graphs=2)
    engine(_x(8))  # the buffers are large enough from here on
    for batch in (1, 1, 2, 2, 1, 3, 3):  # 2 goes, since 1 was replayed after it
        engine(_x(batch))
    assert engine.graphs == 2
    before = session.launches
    engine(_x(1))
    engine(_x(3))
    assert session.launches == before + 2
    runs = session.runs
    engine(_x(2))
    assert (session.launches, session.runs) == (before + 2, runs + 1)
    assert engine.graphs == 2


def test_growing_buffers_drop_the_graphs_that_hold_the_old_ones():
    session = FakeSession()
    engine = _engine(session)
    for _ in range(3):
        engine(_x(1))
    assert engine.graphs == 1
    x = _x(8)
    assert torch.equal(engine(x), 2 * x + 1)
    assert engine.graphs == 0
    for seed in range(3):
        x = _x(1, seed=seed)
        assert torch.equal(engine(x), 2 * x + 1)
    assert engine.graphs == 1


def test_shapes_are_set_once_in_a_row():
    session = FakeSession()
    engine = _engine(session)
    for _ in range(5):
        engine(_x(2))
    assert session.shapings == 1
    assert session.changes == 1


@pytest.mark.parametrize(
    ("batch", "profile"),
    [(1, 0), (4, 0), (5, 1), (6, 2), (8, 2), (16, 1), (3, 0)],
)
def test_shapes_choose_their_profile(batch, profile):
    # 5 fits 1 and 2 and 1 is tuned for it; 6 fits both and 2 is tighter; 4 fits all
    profiles = ((1, 2, 4), (1, 5, 16), (1, 8, 8))
    session = FakeSession(profiles)
    assert choose_profile(session.profiles, session.inputs, ((batch, 4),)) == profile
    x = _x(batch)
    assert torch.equal(_engine(session)(x), 2 * x + 1)


def test_inputs_of_another_shape_name_all_profiles():
    engine = _engine(FakeSession(((1, 2, 4), (8, 8, 8))))
    for wrong in (_x(5), _x(1, 5), _x(2, 4, 1), torch.zeros(())):
        with pytest.raises(ConfigError, match="no profile of the engine holds x") as caught:
            engine(wrong)
        assert str(list(wrong.shape)) in caught.value.what
        assert "profile 0: x [1, 4] to [4, 4]; profile 1: x [8, 4]" in caught.value.why
        assert "dims" in caught.value.fix
    x = _x(2)
    assert torch.equal(engine(x), 2 * x + 1)


@pytest.mark.parametrize(
    ("args", "named", "what", "fix"),
    [
        ((), {}, "input 'x' is missing", "give all of x"),
        ((), {"X": 1}, "no input 'X'", "one of: x"),
        ((1, 2), {}, "has 1 input, and 2 were given", "give x"),
        ((1,), {"x": 1}, "given by position and by name", "once"),
        (("text",), {}, "an input is str", "torch tensor"),
        ((None,), {}, "an input is NoneType", "torch tensor"),
        (
            (torch.zeros(2, 4, dtype=torch.float16),),
            {},
            "is float16, and the engine takes float32",
            ".to(torch.float32)",
        ),
        ((torch.zeros(2, 4, device="meta"),), {}, "is on meta, and the engine on cpu", "copy=True"),
        ((torch.zeros(4, 2).t(),), {}, r"not contiguous: shape \[2, 4\], strides \[1, 2\]", ".contiguous()"),
        ((np.zeros((2, 4)),), {}, "is float64, and the engine takes float32", ".to(torch.float32)"),
        ((np.array(["a"]),), {}, "torch has no dtype for numpy's <U1", "numbers"),
    ],
)
def test_wrong_arguments(args, named, what, fix):
    engine = _engine()
    with pytest.raises(ConfigError, match=what) as caught:
        engine(*args, **named)
    assert fix in caught.value.fix
    x = _x(2)
    assert torch.equal(engine(x), 2 * x + 1)
    assert engine.copies in (0, 1)


def test_a_copy_is_made_when_asked_for_and_counted():
    engine = _engine()
    x = _x(4, 2).t()
    assert torch.equal(engine.run({"x": x}, copy=True)["y"], 2 * x + 1)
    assert engine.copies == 1
    engine.run({"x": x.contiguous()}, copy=True)
    assert engine.copies == 1
    with pytest.raises(ConfigError, match="float64"):
        engine.run({"x": x.double()}, copy=True)


def test_numpy_in_numpy_out():
    engine = _engine()
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    y = engine(x)
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, 2 * x + 1)
    assert engine.copies == 2
    with pytest.raises(ConfigError, match="numpy arrays cannot be bound"):
        engine.bind(x)


def test_dlpack_is_shared():
    class Foreign:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **kwargs):
            return self.tensor.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    x = _x(2)
    shared, copied = fetch_tensor(Foreign(x), CPU)
    assert shared.data_ptr() == x.data_ptr()
    assert not copied
    engine = _engine()
    assert torch.equal(engine(Foreign(x)), 2 * x + 1)
    assert engine.copies == 0


def test_bfloat16_crosses_numpy():
    tensor, copied = fetch_tensor(np.array([1.5, 2], ml_dtypes.bfloat16), CPU)
    assert tensor.dtype is torch.bfloat16
    assert tensor.tolist() == [1.5, 2]
    assert copied


def test_types_that_torch_lacks():
    assert torch_dtype("float8_e4m3fn") is torch.float8_e4m3fn
    for name in ("int4", "fp4", "nn"):
        with pytest.raises(ConfigError, match=f"is {name}, which torch lacks"):
            torch_dtype(name)


def test_bind_reads_and_writes_in_place():
    engine = _engine()
    x, y = _x(2), torch.empty(2, 4)
    step = engine.bind(x, out=y)
    assert torch.equal(y, 2 * x + 1)
    assert step.captured
    for seed in range(1, 4):
        x.copy_(_x(2, seed=seed))
        assert step() is y
        assert torch.equal(y, 2 * x + 1)
    assert step.inputs[0] is x
    assert step.outputs is y


def test_bind_makes_outputs_and_takes_them_by_name_or_in_order():
    engine = _engine(FakeSession(outputs=2))
    x, y, z = _x(2), torch.empty(2, 4), torch.empty(2)
    for out in ({"z": z, "y": y}, [y, z], (y, z)):
        y.zero_()
        step = engine.bind(x, out=out)
        assert step.outputs["y"] is y
        assert step.outputs["z"] is z
        assert torch.equal(y, 2 * x + 1)
    made = engine.bind(x=x)
    assert torch.equal(made.outputs["y"], y)
    assert made.outputs["y"].data_ptr() != y.data_ptr()


def test_bound_and_plain_calls_of_several_shapes_mix():
    engine = _engine()
    x, small = _x(4), _x(1)
    step, other = engine.bind(x), engine.bind(small)
    for seed in range(6):
        plain = _x(1 + seed % 3, seed=seed)
        assert torch.equal(engine(plain), 2 * plain + 1)
        x.fill_(seed)
        small.fill_(-seed)
        assert torch.equal(step(), 2 * x + 1)
        assert torch.equal(other(), 2 * small + 1)


@pytest.mark.parametrize(
    ("out", "what"),
    [
        (torch.empty(3, 4), r"is float32 \[3, 4\] on cpu, contiguous"),
        (torch.empty(2, 4, dtype=torch.float16), "is float16"),
        (torch.empty(4, 2).t(), "not contiguous"),
        (torch.empty(2, 4, device="meta"), "on meta"),
        ("text", "has 1 output, and 4 were given"),
        ([5], "is int, not a tensor"),
        ({"w": torch.empty(2, 4)}, "has no output 'w'"),
        ([], "output 'y' is missing"),
        ([torch.empty(2, 4)] * 2, "has 1 output, and 2 were given"),
        (torch.empty(3, 4).view(-1)[1:9].view(2, 4), "not a multiple of 64"),
    ],
)
def test_a_wrong_out(out, what):
    engine = _engine()
    with pytest.raises(ConfigError, match=what):
        engine.bind(_x(2), out=out)
    x = _x(2)
    assert torch.equal(engine(x), 2 * x + 1)


def test_an_unaligned_input_can_be_called_with_but_not_bound():
    engine = _engine()
    x = torch.arange(9, dtype=torch.float32)[1:].view(2, 4)
    for _ in range(3):
        assert torch.equal(engine(x), 2 * x + 1)
    with pytest.raises(ConfigError, match="multiple of 64") as caught:
        engine.bind(x)
    assert "clone" in caught.value.fix


def test_a_failed_run_leaves_the_next_call_whole():
    session = FakeSession()
    engine = _engine(session)
    x = _x(2)
    session.fail_runs = 1
    with pytest.raises(ArtifactError, match="the run fails"):
        engine(x)
    session.fail_shapes = True
    with pytest.raises(ArtifactError, match="shapes fail"):
        engine(_x(3))
    session.fail_shapes = False
    for batch in (2, 3, 2, 3, 2, 3):
        x = _x(batch)
        assert torch.equal(engine(x), 2 * x + 1)


def test_out_of_memory_is_said_and_the_next_call_works(monkeypatch):
    engine = _engine()
    x = _x(2)
    engine(x)
    real, left = torch.empty, [0]

    def empty(*args, **kwargs):
        if not left[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        left[0] -= 1
        return real(*args, **kwargs)

    larger = _x(8)
    for allowed in (0, 1, 2):  # the output; the first buffer; the second one
        left[0] = allowed
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            with pytest.raises(ArtifactError, match="no memory left on cpu") as caught:
                engine(larger)
            assert "smaller inputs" in caught.value.fix
        for again in (x, larger, x):
            assert torch.equal(engine(again), 2 * again + 1)
        engine.close()
        engine = _engine()
        engine(x)


def test_profile_times_layers_without_graphs_and_only_inside():
    session = FakeSession()
    engine = _engine(session)
    x = _x(2)
    with engine.profile() as times:
        for _ in range(3):
            assert torch.equal(engine(x), 2 * x + 1)
    assert session.open == 1
    assert times.layers == {"first": 0.25, "second": 0.75}
    assert times.runs == {"first": 3, "second": 3}
    assert times.total_ms == 1
    assert session.captures == 0
    assert str(times).splitlines()[0].endswith("75.0 %  second")
    engine(x)
    assert times.runs["first"] == 3


def test_no_layers_can_be_shown():
    assert str(LayerTimes()) == "   0.0000 ms          0 layers"


def test_close_frees_everything_and_refuses_further_calls():
    session = FakeSession()
    with _engine(session) as engine:
        step = engine.bind(_x(2))
    assert session.closed
    assert not session.open
    engine.close()
    for call in (lambda: engine(_x(2)), step, lambda: engine.bind(_x(2))):
        with pytest.raises(ConfigError, match="the engine was closed"):
            call()


def test_the_last_reference_closes_and_a_bound_call_is_one():
    session = FakeSession()
    engine = _engine(session)
    gone = weakref.ref(engine)
    x = _x(2)
    step = engine.bind(x)
    del engine
    gc.collect()
    assert torch.equal(step(), 2 * x + 1)
    del step
    gc.collect()
    assert gone() is None
    assert session.closed


def test_facts():
    engine = _engine(FakeSession(outputs=2))
    assert engine.inputs == (TensorSpec("x", "float32", ("x[0]", 4)),)
    assert [spec.name for spec in engine.outputs] == ["y", "z"]
    assert engine.profiles == ({"x": ((1, 4), (2, 4), (8, 4))},)
    assert engine.device == CPU
    assert (engine.contexts, engine.graphs, engine.copies) == (1, 0, 0)


@pytest.mark.parametrize("limits", [{"contexts": 0}, {"graphs": -1}])
def test_wrong_limits(limits):
    with pytest.raises(ConfigError, match=r"contexts=\d, graphs=-?\d+"):
        _engine(**limits)


def test_ten_thousand_calls_keep_nothing():
    session = FakeSession()
    engine = _engine(session, graphs=3)
    for number in range(10_000):
        engine(torch.zeros(1 + number % 8, 4))
        session.gpu.recorded.clear()
        session.gpu.reached.clear()
    assert engine.graphs <= 3
    assert engine.contexts == 1
    assert len(engine._plans) == 8


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr("trtforge.runtime.engine._PLANS_KEPT", 3)
    engine = _engine(FakeSession(profiles=((1, 2, 64),)))
    for batch in [*range(1, 20), 1, 2, 1]:
        x = _x(batch)
        assert torch.equal(engine(x), 2 * x + 1)
    assert len(engine._plans) == 3


@pytest.mark.parametrize("limits", [{}, {"contexts": 0}])
def test_an_engine_that_cannot_start_closes_its_session(limits, monkeypatch, tmp_path):
    session = FakeSession()
    session.fail_open = True
    monkeypatch.setattr("trtforge.runtime.trt.session.EngineSession", lambda *args, **named: session)
    with pytest.raises((ArtifactError, ConfigError)):
        Engine(tmp_path / "model.engine", backend="tensorrt-rtx", version="1.7", **limits)
    assert session.closed
