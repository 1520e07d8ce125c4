from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from trtforge.runtime.device import DeviceFacts
from trtforge.runtime.trt import runtime_cache
from trtforge.runtime.trt.runtime_cache import RuntimeCacheFile, cache_folder

GPU = DeviceFacts("NVIDIA H100 80GB HBM3", "9.0", 132, "13.0", 1 << 36)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trtforge" / "runtime"


def _file(digest: str = "ab" * 32, version: str = "1.6.1.120", gpu: DeviceFacts = GPU) -> RuntimeCacheFile:
    file = RuntimeCacheFile.of_engine(Path("unread"), version, gpu, digest)
    assert file is not None
    return file


def test_what_is_written_is_read_by_the_next_process(folder):
    assert _file().read() is None
    _file().write(b"kernels")
    assert _file().read() == b"kernels"
    assert [path.parent for path in folder.iterdir()] == [folder]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_name_tells_engine_release_and_gpu(folder):
    assert _file().path == folder / f"{'ab' * 16}-1.6.1.120-nvidia-h100-80gb-hbm3-9.0-132.bin"
    other_gpu = DeviceFacts("NVIDIA H100 80GB HBM3", "9.0", 114, "13.0", 1 << 36)
    names = {_file().path, _file("cd" * 32).path, _file(version="1.7").path, _file(gpu=other_gpu).path}
    assert len(names) == 4


def test_the_engine_is_hashed_where_its_digest_is_unknown(tmp_path):
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"plan")
    file = RuntimeCacheFile.of_engine(engine, "1.6", GPU)
    assert file.path.name.startswith(hashlib.sha256(b"plan").hexdigest()[:32] + "-1.6-")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: bytes([data[0] ^ 1]) + data[1:],
        lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"garbage" * 1000,
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning_and_made_anew(damage):
    _file().write(b"kernels")
    path = _file().path
    path.write_bytes(damage(path.read_bytes()))
    again = _file()
    with pytest.warns(RuntimeWarning, match=r"is damaged; it is ignored"):
        assert again.read() is None
    again.write(b"kernels")
    assert _file().read() == b"kernels"


def test_what_did_not_change_is_not_written_again():
    file = _file()
    file.write(b"kernels")
    os.utime(file.path, (1, 1))
    file.write(b"kernels")
    assert file.path.stat().st_mtime == 1
    file.write(b"more")
    assert file.path.stat().st_mtime > 1
    again = _file()
    assert again.read() == b"more"
    os.utime(file.path, (1, 1))
    again.write(b"more")
    assert file.path.stat().st_mtime == 1


def test_a_disk_that_fails_costs_time_only(folder):
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="cannot be read: Not a directory"):
        assert _file().read() is None
    _file().write(b"kernels")
    assert folder.read_text().startswith("a file")


def test_old_files_and_those_of_killed_writers_go(folder, monkeypatch):
    monkeypatch.setattr(runtime_cache, "_KEPT_FILES", 3)
    folder.mkdir(parents=True)
    killed, writing = folder / ".writing-killed", folder / ".writing-now"
    for path in (killed, writing):
        path.write_bytes(b"half")
    os.utime(killed, (1, 1))
    for number in range(5):
        _file(f"{number}" * 64).write(b"kernels")
        os.utime(_file(f"{number}" * 64).path, (1000 + number, 1000 + number))
    assert _file("2" * 64).read() == b"kernels"  # used again
    _file("9" * 64).write(b"kernels")
    assert {path.name[:2] for path in folder.glob("*.bin")} == {"22", "44", "99"}
    assert not killed.exists()
    assert writing.exists()


def test_a_reader_sees_an_old_file_or_a_new_one_whole():
    _file().write(bytes(200_000))
    stop = threading.Event()

    def write(value: int) -> None:
        while not stop.is_set():
            file = _file()
            file.write(bytes([value]) * 200_000)
            file.write(bytes([value + 1]) * 200_000)

    writers = [threading.Thread(target=write, args=(value,)) for value in (1, 11)]
    for writer in writers:
        writer.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            until = time.monotonic() + 1
            while time.monotonic() < until:
                content = _file().read()
                assert content is not None
                assert len(set(content)) == 1
    finally:
        stop.set()
        for writer in writers:
            writer.join()


def test_where_the_folder_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == tmp_path / ".cache" / "trtforge" / "runtime"


def test_a_user_without_a_home_keeps_nothing():
    code = (
        "import os; os.setuid(54321); from pathlib import Path; "
        "from trtforge.runtime.trt.runtime_cache import cache_folder, RuntimeCacheFile; "
        "print(cache_folder(), RuntimeCacheFile.of_engine(Path('x'), '1', None, 'ab'))"
    )
    if os.getuid() != 0:
        pytest.skip("takes root to become nobody")
    env = {key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if "PermissionError" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip("nobody may not read this checkout")
    assert done.stdout == "None None\n", done.stderr
