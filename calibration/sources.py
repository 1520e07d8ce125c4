"""Data that needs no code: an `.npz` file, or a folder of images with its preprocessing.

Both are functions, so that a YAML file may name them as it names any loader:

    calibration: {loader: "trtforge.calibration.sources:images", kwargs: {folder: data/calib, size: 224}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trtforge.runtime.errors import ConfigError, MissingDependencyError
from trtforge.runtime.runner import Array

__all__ = ["IMAGE_SUFFIXES", "images", "npz"]

IMAGE_SUFFIXES: tuple[str, ...] = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def npz(path: str | Path, *, batch: int = 8) -> Callable[[], Iterator[dict[str, Array]]]:
    """Batches from an `.npz` file that holds one array for each input, under its name, samples along the first axis.

    Raises:
        ConfigError: the file cannot be read, holds Python objects, or arrays of different length.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}", fix="write it with numpy.savez(path, input_name=array, ...)"
        ) from error
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ConfigError(
            f"{path} holds arrays of length {lengths}", fix="every input needs the same number of samples, 1 or more"
        )
    count = next(iter(lengths.values()))

    def batches() -> Iterator[dict[str, Array]]:
        for start in range(0, count, batch):
            yield {name: array[start : start + batch] for name, array in arrays.items()}

    return batches


def images(
    folder: str | Path,
    *,
    size: int | tuple[int, int] = 224,
    resize: int | None = None,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    layout: Literal["NCHW", "NHWC"] = "NCHW",
    batch: int = 8,
    limit: int | None = None,
) -> Callable[[], Iterator[Array]]:
    """Batches of the images below a folder, in the order of their paths; each is read when it is needed.

    Converted to RGB, the shorter side resized (bilinear), the centre cropped, divided by 255, normalized.

    Args:
        folder: Searched with all folders below it for `IMAGE_SUFFIXES`.
        size: Height and width of the crop.
        resize: What the shorter side becomes; None: the larger of `size` times 8/7 (256 for 224).
        mean: Subtracted from each channel; ImageNet's by default.
        std: Divides each channel.
        layout: Order of the axes.
        batch: Images at a time.
        limit: Images at most.

    Raises:
        ConfigError: there are no images, or (while iterating) one that cannot be read, by its name.
        MissingDependencyError: Pillow is not installed.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)[:limit]
    if not paths:
        raise ConfigError(
            f"{folder} holds no images" if folder.is_dir() else f"{folder} is no folder",
            fix=f"give a folder with files that end in {', '.join(IMAGE_SUFFIXES)}",
        )
    height, width = (size, size) if isinstance(size, int) else size
    shorter = resize if resize is not None else round(max(height, width) * 8 / 7)
    if shorter < max(height, width):
        raise ConfigError(f"resize {shorter} is below the crop's size {[height, width]}", fix="resize to at least it")
    offset, factor = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def batches() -> Iterator[Array]:
        for start in range(0, len(paths), batch):
            pixels = np.stack([_read(path, height, width, shorter) for path in paths[start : start + batch]])
            normal = ((pixels.astype(np.float32) / 255 - offset) / factor).astype(np.float32)
            yield np.ascontiguousarray(normal.transpose(0, 3, 1, 2)) if layout == "NCHW" else normal

    return batches


def _read(path: Path, height: int, width: int, shorter: int) -> NDArray[np.uint8]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependencyError(
            "Pillow, which reads images, is not installed", fix="pip install pillow"
        ) from error
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ConfigError(f"cannot read the image {path}: {error}", fix="repair it, or take it out") from error
    scale = shorter / min(picture.size)
    resized = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR)
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return np.asarray(resized.crop((left, top, left + width, top + height)), np.uint8)
