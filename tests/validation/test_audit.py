"""How an audit is scored."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtforge.validation.audit import AuditReport, Trial

OUTCOMES = st.sampled_from(["passed", "failed", "not_proved", "error"])
TRIALS = st.lists(
    st.builds(
        Trial,
        kind=st.sampled_from("ab"),
        what=st.just("w"),
        seed=st.integers(0, 9),
        stage=st.just("export"),
        fault=st.booleans(),
        proof=OUTCOMES,
        held_out=OUTCOMES,
    ),
    max_size=12,
)


def report(trials):
    return AuditReport("m", tuple(trials), golden=(9, 481), held_out=(87, 4932), wanted=(300, 100))


def fault(proof="failed", held_out="failed"):
    return Trial("k", "w", 0, "export", True, proof, held_out, polygraphy=True, polygraphy_own=False)


def test_a_fault_counts_where_the_held_out_set_shows_it():
    found = report([fault(), fault(held_out="passed"), fault(held_out="error"), fault(held_out="not_proved")])
    assert (len(found.faults), len(found.set_aside)) == (2, 2)


def test_one_in_a_hundred_may_pass():
    assert report([fault()] * 99 + [fault(proof="passed")]).passed
    assert not report([fault()] * 98 + [fault(proof="passed")]).passed


def test_not_proved_is_a_refusal():
    assert fault(proof="not_proved").refused
    assert fault(proof="error").refused
    assert not fault(proof="passed").refused


def test_a_refused_rewrite_fails_the_audit():
    rewrite = replace(fault(proof="passed", held_out="passed"), fault=False)
    assert report([fault(), rewrite]).passed
    assert not report([fault(), replace(rewrite, proof="not_proved")]).passed


def test_nothing_planted_proves_nothing():
    assert not report([]).passed
    assert not report([fault(held_out="passed")]).passed


@given(TRIALS)
def test_counts_add_up(trials):
    found = report(trials)
    assert len(found.faults) + len(found.set_aside) + len(found.rewrites) == len(trials)
    assert set(found.let_through) <= set(found.faults)
    assert 0 <= found.refused_share <= 1
    data = found.to_json()
    assert data["refused"] + len(data["let_through"]) == data["faults"]
    assert data["polygraphy"]["polygraphy"]["faults_refused"] == 0


@pytest.mark.parametrize("own", ["polygraphy", "polygraphy_own"])
def test_polygraphy_is_scored_beside_it(own):
    assert report([fault()]).to_json()["polygraphy"][own]["faults_refused"] == (own == "polygraphy")
