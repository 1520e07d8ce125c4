"""Publishing a folder: whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trtforge.runtime import publish
from trtforge.runtime.errors import ArtifactError
from trtforge.runtime.publish import hash_bytes, hash_file, publish_folder, staging_folder


def fill(folder: Path, text: str) -> None:
    for name in "abc":
        (folder / name).write_text(text)


def test_publishes_new_and_replaces_old(tmp_path: Path) -> None:
    target = tmp_path / "out" / "model"
    for text in ("one", "two"):
        with staging_folder(target.parent) as staged:
            fill(staged, text)
            publish_folder(staged, target)
        assert {p.read_text() for p in target.iterdir()} == {text}
        assert os.listdir(target.parent) == ["model"]


def test_works_where_exchange_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "_exchange", lambda a, b: False)
    test_publishes_new_and_replaces_old(tmp_path)


def test_nothing_is_left_when_the_work_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staging_folder(tmp_path) as staged:
        fill(staged / "missing", "half")
    assert os.listdir(tmp_path) == []


def test_reader_never_sees_a_mixture(tmp_path: Path) -> None:
    target = tmp_path / "model"
    seen: set[tuple[str, ...]] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                folder = os.open(target, os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                # Relative to the opened folder: whichever one it is, it must be whole.
                texts = []
                for name in "abc":
                    with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:
                        texts.append(file.read())
                seen.add(tuple(texts))
            except FileNotFoundError:
                pass  # the old folder is being deleted after the exchange
            finally:
                os.close(folder)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        with staging_folder(tmp_path) as staged:
            fill(staged, str(number))
            publish_folder(staged, target)
            assert target.is_dir()
    stop.set()
    reader.join()
    assert seen
    assert all(len(set(texts)) == 1 for texts in seen)


@pytest.mark.parametrize("kind", ["file", "link"])
def test_refuses_to_replace_what_is_no_folder(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    if kind == "file":
        target.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to(tmp_path / "elsewhere")
    with staging_folder(tmp_path) as staged, pytest.raises(ArtifactError, match="not an artifact's folder"):
        publish_folder(staged, target)
    assert target.exists()


def test_stale_folders_are_swept_and_live_ones_kept(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, signal; from trtforge.runtime.publish import staging_folder\n"
        f"with staging_folder(pathlib.Path({str(tmp_path)!r})) as p:\n"
        "    (p / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (stale,) = tmp_path.iterdir()
    old = time.time() - 3600
    os.utime(stale, (old, old))
    with staging_folder(tmp_path) as first:
        os.utime(first, (old, old))
        with staging_folder(tmp_path) as second:
            assert sorted(tmp_path.iterdir()) == sorted([first, second])


def test_unwritable_parent_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write into"), staging_folder(tmp_path / "file" / "below"):
        pass


def test_hashes_agree(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)
    assert hash_file(tmp_path / "x") == hash_bytes(data)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux shows the mask there")
def test_the_umask_holds_and_is_never_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (staged := tmp_path / "staged").mkdir()
    (staged / "file").touch(0o600)
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("other threads would write by this mask"))
            publish_folder(staged, tmp_path / "done")
    finally:
        os.umask(before)
    assert (tmp_path / "done").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "done/file").stat().st_mode & 0o777 == 0o640
