from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trtforge.calibration.loaders import read_batches
from trtforge.calibration.sources import images, npz
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.specs import InputSpec


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    ids, mask = np.arange(20).reshape(5, 4), np.ones((5, 4), bool)
    np.savez(path, ids=ids, mask=mask)
    specs = (InputSpec("ids", "int64", ("n", 4)), InputSpec("mask", "bool", ("n", 4)))
    source = npz(path, batch=2)
    for _ in range(2):  # a function can be read again
        found = list(read_batches(source, specs))
        np.testing.assert_array_equal(np.concatenate([batch["ids"] for batch in found]), ids)
        assert [len(batch["mask"]) for batch in found] == [2, 2, 1]


def test_wrong_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, a=np.zeros(3), b=np.zeros(4))
    with pytest.raises(ConfigError, match=r"length \{'a': 3, 'b': 4\}"):
        npz(path)
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(ConfigError, match="cannot read"):
        npz(path)
    with pytest.raises(ConfigError, match="cannot read"):
        npz(tmp_path / "none.npz")


def save_image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_images(tmp_path: Path) -> None:
    save_image(tmp_path / "b.png", (0, 255, 0))
    save_image(tmp_path / "a" / "z.JPG", (255, 255, 255), (30, 50))
    save_image(tmp_path / "c.bmp", (0, 0, 0))
    (tmp_path / "notes.txt").write_text("no image")
    source = images(tmp_path, size=16, batch=2)
    first, second = read_batches(source, (InputSpec("x", "float32", ("n", 3, 16, 16)),))
    assert (first["x"].shape, second["x"].shape) == ((2, 3, 16, 16), (1, 3, 16, 16))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(first["x"][0, :, 8, 8], (1 - mean) / std, rtol=1e-5)
    np.testing.assert_allclose(first["x"][1, :, 8, 8], ([0, 1, 0] - mean) / std, rtol=1e-5)
    np.testing.assert_allclose(second["x"][0, :, 8, 8], -mean / std, rtol=1e-5)


def test_layout_size_and_limit(tmp_path: Path) -> None:
    for name in "abc":
        save_image(tmp_path / f"{name}.png", (9, 9, 9))
    (batch,) = images(tmp_path, size=(8, 12), resize=20, mean=(0, 0, 0), std=(1, 1, 1), layout="NHWC", limit=2)()
    assert batch.shape == (2, 8, 12, 3)
    np.testing.assert_allclose(batch, 9 / 255, rtol=1e-6)


def test_wrong_images(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no images"):
        images(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        images(tmp_path / "none")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(ConfigError, match=r"cannot read the image .*broken\.png"):
        list(images(tmp_path)())
    with pytest.raises(ConfigError, match="resize 8 is below"):
        images(tmp_path, size=16, resize=8)
