import struct

import pytest

from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.trt.header import read_rtx_header


def _plan(body: int = 100, mask: int = 0b1100, size: int | None = None) -> bytes:
    length = 64 + body if size is None else size
    head = struct.pack("<4sxxxxQQ4s4sI", b"vtrt", 2, length, bytes((1, 7, 1, 116)), b"vtrt", mask)
    return head.ljust(64, b"\0") + bytes(body)


def test_facts_of_a_plan(tmp_path):
    path = tmp_path / "model.engine"
    path.write_bytes(_plan())
    header = read_rtx_header(path)
    assert header.version == "1.7.1.116"
    assert header.size_bytes == 164
    assert header.compute_capabilities == ("8.6", "8.9")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (_plan()[:-1], "has 163 bytes, and its header says 164"),
        (_plan() + b"x", "has 165 bytes"),
        (_plan()[:40], "not a TensorRT-RTX plan"),
        (b"", "too short"),
        (b"ftrt" + _plan()[4:], "starts with b'ftrt'"),
    ],
)
def test_what_is_no_whole_plan_is_refused(tmp_path, data, says):
    path = tmp_path / "model.engine"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.engine") as caught:
        read_rtx_header(path)
    assert says in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ArtifactError, match="cannot read the engine"):
        read_rtx_header(tmp_path / "absent")
