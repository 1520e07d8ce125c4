from __future__ import annotations

from pathlib import Path

import pytest

from trtforge.converter.frames import current_line, line_of_error, line_of_trace


@pytest.mark.parametrize(
    ("trace", "line"),
    [
        ("", ""),
        ('File "/home/u/net.py", line 3, in forward\n    x', "u/net.py:3"),
        (
            'File "/home/u/net.py", line 3, in forward\n File "/x/site-packages/torch/nn/a.py", line 9, in forward',
            "u/net.py:3",
        ),
        (
            'File "/x/site-packages/timm/vit.py", line 7, in f\n File "/x/site-packages/torch/nn/a.py", line 9, in f',
            "timm/vit.py:7",
        ),
    ],
)
def test_line_of_trace(trace: str, line: str) -> None:
    found = line_of_trace(trace)
    assert ("" if found is None else str(found)) == line


def test_the_line_of_an_error_is_ours_not_the_librarys() -> None:
    with pytest.raises(ValueError, match="literal") as caught:
        Path(str(int("x")))
    found = line_of_error(caught.value)
    assert found is not None
    assert found.file == Path(__file__)
    assert found.code == 'Path(str(int("x")))'


def test_the_current_line_is_the_callers() -> None:
    found = max([1], key=lambda _: 1) and current_line()
    assert found is not None
    assert found.code.startswith("found = max(")
