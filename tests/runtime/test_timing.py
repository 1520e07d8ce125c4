"""Figures of sides whose every call takes a known time, and the batch size found from them."""

from __future__ import annotations

import gc

import pytest
from fake_gpu_clock import FakeClock

from trtforge.runtime.batch_tuning import tune_batch
from trtforge.runtime.timing import Effort, Timing, time_sides


def test_median_p90_p99_and_throughput_of_each_side():
    clock = FakeClock()
    calls = {"steady": 0, "jumpy": 0}

    def steady() -> None:
        calls["steady"] += 1
        clock.spend(2.0)

    def jumpy() -> None:
        calls["jumpy"] += 1
        clock.spend(9.0 if calls["jumpy"] % 20 == 0 else 1.0)

    found = time_sides({"steady": steady, "jumpy": jumpy}, clock, Effort(rounds=5, round_ms=80))
    assert found["steady"].median_ms == pytest.approx(2.0, abs=0.01)
    assert found["steady"].p99_ms == pytest.approx(2.0, abs=0.01)
    assert found["steady"].queued_ms == pytest.approx(2.0, abs=0.01)
    assert found["jumpy"].median_ms == pytest.approx(1.0, abs=0.01)
    assert found["jumpy"].p90_ms == pytest.approx(1.0, abs=0.01)
    assert found["jumpy"].p99_ms == pytest.approx(9.0, abs=0.01)
    assert found["jumpy"].queued_ms == pytest.approx(1.4, abs=0.15)
    assert found["steady"].latencies == 5 * 39
    assert gc.isenabled()


def test_sides_take_turns():
    clock = FakeClock()
    order: list[str] = []

    def side(name: str):
        def call() -> None:
            if not order or order[-1] != name:
                order.append(name)
            clock.spend(1.0)

        return call

    time_sides({"a": side("a"), "b": side("b")}, clock, Effort(rounds=4, round_ms=20))
    assert "".join(order) == "ab" * 5  # once to calibrate, then each round


def test_a_failing_call_leaves_the_collector_as_it_was():
    clock = FakeClock()
    calls = 0

    def fails() -> None:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        time_sides({"a": fails}, clock, Effort(rounds=2, round_ms=20))
    assert gc.isenabled()


def _model(base: float, each: float, *, slow: tuple[int, ...] = ()):
    """Latency of a GPU that takes `base` ms and `each` ms an item; `slow` batches take half as much again."""
    seen: list[int] = []

    def measure(batch: int) -> Timing:
        seen.append(batch)
        ms = (base + each * batch) * (1.5 if batch in slow else 1.0)
        return Timing(ms, ms, ms, ms, 100)

    return measure, seen


def test_the_largest_batch_within_the_limit_where_throughput_grows():
    measure, seen = _model(1.0, 0.1)
    tuned = tune_batch(measure, 1, 128, 5.0)  # 40 items take 5 ms
    assert tuned.batch is not None
    assert 38 <= tuned.batch <= 40
    assert tuned.tried[tuned.batch].p99_ms <= 5.0
    assert len(seen) == len(set(seen)) <= 13
    assert list(tuned.tried) == sorted(seen)


def test_a_smaller_batch_that_serves_more_is_preferred():
    measure, _ = _model(0.2, 0.1, slow=(48,))
    tuned = tune_batch(measure, 16, 48, 9.0)
    assert tuned.batch == 32
    assert tuned.tried[48].p99_ms <= 9.0


def test_all_fit_and_none_fits():
    measure, _ = _model(1.0, 0.1)
    assert tune_batch(measure, 1, 100, 1000.0).batch == 100
    none = tune_batch(measure, 4, 100, 0.5)
    assert none.batch is None
    assert list(none.tried) == [4]


@pytest.mark.parametrize("high", [1, 2, 3, 5, 31])
@pytest.mark.parametrize("limit", [1.05, 1.1, 1.25, 1.3, 2.0])
def test_every_tried_size_is_one_that_the_engine_takes(high, limit):
    measure, seen = _model(1.0, 0.1)
    tuned = tune_batch(measure, 1, high, limit)
    assert all(1 <= batch <= high for batch in seen)
    fitting = [batch for batch in range(1, high + 1) if 1.0 + 0.1 * batch <= limit]
    assert tuned.batch == (max(fitting) if fitting else None)
