from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from trtforge.converter.candidates import Workbench
from trtforge.runtime.precision import Precision, PrecisionPlan, Rule


@pytest.mark.parametrize(("default", "other"), [("int8", "fp8"), ("fp8", "int8")])
def test_ranges_are_those_of_the_candidate_whatever_the_users_rules_quantize_beside_it(
    default: Precision, other: Precision
) -> None:
    class AskedError(Exception): ...

    def calibrate(plan: PrecisionPlan) -> Any:
        raise AskedError(plan.default)

    plan = PrecisionPlan("fp16", (Rule(other, op="MatMul"),))
    unused: Any = None
    config: Any = SimpleNamespace(plan=plan)
    bench = Workbench(config, unused, (), unused, None, None, unused, calibrate)
    with pytest.raises(AskedError, match=default):
        bench.quantization(replace(plan, default=default))
