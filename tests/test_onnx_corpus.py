"""The corpus itself is sound: each case is valid ONNX and runs at several sizes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx_corpus import CORPUS, Case


@pytest.mark.parametrize("case", CORPUS, ids=str)
def test_case_is_valid_and_runs(case: Case) -> None:
    proto = case.proto()
    onnx.checker.check_model(proto, full_check=True)
    for batch in (1, 3):
        outputs = case.expected(batch)
        assert list(outputs) == [output.name for output in proto.graph.output]
        assert all(np.isfinite(output).all() for output in outputs.values())


def test_names_are_unique() -> None:
    assert len({case.name for case in CORPUS}) == len(CORPUS)
