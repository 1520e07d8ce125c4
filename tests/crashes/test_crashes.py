"""Models that crash a native library, as text: each fails with a message and an exit code, and leaves nothing.

A failure met in the field becomes a file here: `# error: CLASS in STAGE` and `# says: TEXT` are what is expected of it.
A library that no longer crashes on one converts it, which is as well.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import onnx
import onnx.parser
import pytest

import trtforge

CASES = sorted(Path(__file__).parent.glob("*.onnx.txt"))


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name.partition(".")[0])
def test_crash_is_an_error_with_a_message_and_leaves_nothing(case: Path, tmp_path: Path) -> None:
    text = case.read_text(encoding="utf-8")
    source, out = tmp_path / "model.onnx", tmp_path / "out"
    onnx.save(onnx.parser.parse_model(re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)), source)
    ((kind, stage),) = re.findall(r"^# error: (\w+) in (\w+)$", text, flags=re.MULTILINE)
    try:
        artifact = trtforge.convert(source, None, out / "model")
    except trtforge.TrtForgeError as error:
        assert (type(error).__name__, error.stage) == (kind, stage)  # noqa: PT017  # a newer library may not crash
        for said in re.findall(r"^# says: (.+)$", text, flags=re.MULTILINE):
            assert said in str(error)  # noqa: PT017
        assert set(os.listdir(out)) <= {"model.failed"}
    else:
        assert artifact.status in ("built", "validated", "portable")
