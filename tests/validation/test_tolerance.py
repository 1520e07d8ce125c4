import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.precision import PRECISIONS
from trtforge.validation.metrics import measure
from trtforge.validation.tolerance import DEFAULTS, Tolerance, resolve_tolerance


def figures(**changes):
    return replace(measure(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 4.0])), **changes)


def test_every_precision_has_defaults():
    assert set(DEFAULTS) == set(PRECISIONS)


def test_defaults_loosen_with_the_significand():
    order = [DEFAULTS[p] for p in ("fp32", "tf32", "fp16", "bf16", "int8")]
    for exact, loose in itertools.pairwise(order):
        assert loose.sqnr_db <= exact.sqnr_db
        assert loose.cosine <= exact.cosine
        assert loose.max_abs_over_std >= exact.max_abs_over_std


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cosine_limits_ask_no_more_than_sqnr_limits(precision):
    limit = DEFAULTS[precision]
    assert limit.cosine <= 1 - 10 ** (-limit.sqnr_db / 10) / 2


def test_overrides_merge_with_defaults():
    found = resolve_tolerance(["fp16"], {"sqnr_db": 50, "atol": 0.1})
    assert found == replace(DEFAULTS["fp16"], sqnr_db=50.0, atol=0.1)


def test_mixed_plan_takes_the_loosest():
    assert resolve_tolerance(["fp32", "bf16", "fp16"]) == DEFAULTS["bf16"]


def test_none_switches_a_limit_off():
    assert resolve_tolerance(["fp16"], {"cosine": None}).cosine is None


def test_switching_everything_off_is_refused():
    with pytest.raises(ConfigError, match="nothing that measures the size"):
        resolve_tolerance(["fp16"], {"sqnr_db": None, "max_abs_over_std": None})
    assert resolve_tolerance(["fp16"], {"sqnr_db": None, "max_abs_over_std": None, "rtol": 0.01}).rtol == 0.01


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cosine", 1.5),
        ("atol", -1),
        ("sqnr_db", math.nan),
        ("sqnr_db", math.inf),
        ("sqnr_db", "40"),
        ("rtol", True),
        ("mismatch", None),
    ],
)
def test_wrong_values(name, value):
    with pytest.raises(ConfigError, match=f"tolerance {name} is"):
        resolve_tolerance(["fp16"], {name: value})


def test_unknown_name_suggests():
    with pytest.raises(ConfigError, match="did you mean 'sqnr_db'"):
        resolve_tolerance(["fp16"], {"snr_db": 40})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sqnr_db": 29.0}, "SQNR is 29.0 dB"),
        ({"cosine": 0.9}, "cosine is 0.900000"),
        ({"max_abs_over_std": 0.3}, "0.3 standard deviations"),
        ({"sqnr_db": math.nan}, "SQNR is nan"),
        ({"max_abs_over_std": math.nan}, "nan standard deviations"),
    ],
)
def test_each_limit_is_judged(changes, word):
    (sentence,) = DEFAULTS["fp16"].unmet(figures(**changes), exact=False, pooled=True)
    assert word in sentence


def test_a_sample_alone_may_err_twice_as_much_but_no_more():
    limit = DEFAULTS["fp16"]
    assert not limit.unmet(figures(sqnr_db=25.0), exact=False, pooled=False)
    assert limit.unmet(figures(sqnr_db=23.0), exact=False, pooled=False)


def test_integers_are_exact_unless_asked():
    measures = measure(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]))
    assert DEFAULTS["bf16"].unmet(measures, exact=True, pooled=True) == ("1 of 4 values differ, none may",)
    assert not Tolerance(mismatch=0.25).unmet(measures, exact=True, pooled=True)


def test_elementwise():
    limit = Tolerance(atol=0.0)
    assert limit.elementwise
    assert limit.unmet(figures(violations=2), exact=False, pooled=True) == ("2 of 3 values are beyond atol 0 + rtol 0",)
    assert not Tolerance().unmet(figures(violations=2), exact=False, pooled=True)


def test_json_round_trip():
    tolerance = resolve_tolerance(["int8"], {"rtol": 0.5, "cosine": None})
    assert Tolerance.from_json(json.loads(json.dumps(tolerance.to_json()))) == tolerance
