from __future__ import annotations

import threading
import time

import pytest

from trtforge.runtime.trt.gate import Gate


def test_alone_is_refused_at_once_while_others_are_inside():
    gate = Gate()
    with gate.shared(), gate.alone(wait=False) as entered:
        assert not entered
    with gate.alone(wait=False) as entered:
        assert entered
        with gate.alone(wait=False) as again:
            assert not again
    with gate.shared():
        pass


def test_an_error_inside_leaves_the_gate_open():
    gate = Gate()
    with pytest.raises(ValueError, match="x"), gate.shared():
        raise ValueError("x")
    with pytest.raises(ValueError, match="x"), gate.alone(wait=True):
        raise ValueError("x")
    with gate.alone(wait=False) as entered:
        assert entered


def test_who_waits_to_be_alone_comes_before_later_ones():
    gate = Gate()
    order = []
    leave = threading.Event()
    inside = threading.Event()

    def first() -> None:
        with gate.shared():
            inside.set()
            leave.wait(10)
            order.append("first")

    def alone() -> None:
        with gate.alone(wait=True) as entered:
            assert entered
            order.append("alone")

    def later() -> None:
        with gate.shared():
            order.append("later")

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert inside.wait(10)
    threads.append(threading.Thread(target=alone))
    threads[1].start()
    while not gate._waiting:
        time.sleep(0.001)
    threads.append(threading.Thread(target=later))
    threads[2].start()
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "alone", "later"]


def test_never_anyone_beside_who_is_alone():
    gate = Gate()
    alone = [0]
    seen = []

    def work(number: int) -> None:
        for turn in range(200):
            if (number + turn) % 5:
                with gate.shared():
                    seen.append(alone[0])
                    time.sleep(0)
                    seen.append(alone[0])
            else:
                with gate.alone(wait=bool(turn % 2)) as entered:
                    if entered:
                        alone[0] += 1
                        seen.append(alone[0] - 1)
                        time.sleep(0)
                        alone[0] -= 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(seen)


def test_who_is_inside_is_not_kept_waiting_for_itself():
    """The garbage collector may close another engine, which saves its cache alone, in a thread that runs one."""
    outcome = []

    def collect() -> None:
        gate = Gate()
        for inside in (gate.shared(), gate.alone(wait=True)):
            with inside, gate.alone(wait=True) as entered:
                outcome.append(entered)
        with gate.alone(wait=True) as entered:
            outcome.append(entered)

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(10)
    assert outcome == [False, False, True]
