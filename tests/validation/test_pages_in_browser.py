"""Pages in a real browser: what a person sees, by screenshot. Skips where there is no Chromium."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from trtforge.validation.compare import compare
from trtforge.validation.golden import GoldenSet, Sample
from trtforge.validation.pages import write_page
from trtforge.validation.parity import Candidate
from trtforge.validation.proof import Proof
from trtforge.validation.report import ReportData
from trtforge.validation.tolerance import DEFAULTS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(BROWSERS)}")

LIGHT, DARK = (0xFC, 0xFC, 0xFD), (0x10, 0x13, 0x17)
PASSED_TINT, FAILED_TINT, BAR, CURVE_DOT = (
    (0xE7, 0xF5, 0xEF),
    (0xFC, 0xEB, 0xEC),
    (0x8A, 0xA4, 0xC4),
    (0x2F, 0x6F, 0xEB),
)


def page(folder: Path, *, error: float) -> Path:
    rng = np.random.default_rng(0)
    samples = tuple(
        Sample(f"s{i}", {}, i, {"x": np.full((2, 3), i, np.float32)}, {"y": rng.standard_normal((40, 50), np.float32)})
        for i in range(3)
    )
    golden = GoldenSet(samples, "torch", "2.14")
    outputs = {
        s.name: {"y": (s.outputs["y"] * (1 + error * rng.standard_normal((40, 50)))).astype(np.float32)}
        for s in samples
    }
    reports = tuple(
        compare(golden, outputs, DEFAULTS["fp16"], Candidate(stage, "onnxruntime", "1.32", "fp16", {}))
        for stage in ("export", "precision")
    )
    layers = [
        {"node": f"layer{i}/Conv#0", "op": "Conv", "tensor": f"t{i}", "sqnr_db": 70.0 - i, "greatest": 1.0}
        for i in range(30)
    ]
    path = folder / "report.html"
    write_page(ReportData("net", "built", Proof(reports), {"precision": "fp16", "layers": layers}), path)
    return path


def shoot(path: Path, folder: Path, *, width: int = 1200, height: int = 1700, dark: bool = False) -> np.ndarray:
    assert BROWSER is not None
    shot = folder / f"shot-{width}-{dark}.png"
    look = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage",
               f"--user-data-dir={folder / 'profile'}", *look, f"--window-size={width},{height}",
               f"--screenshot={shot}", path.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return np.rint(imread(shot)[:, :, :3] * 255).astype(int)


def share(image: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(image - np.array(colour)).max(axis=2) <= 2).mean())


def test_a_passed_page_is_green_first_with_its_charts_below(tmp_path: Path) -> None:
    image = shoot(page(tmp_path, error=1e-3), tmp_path)
    assert image.shape == (1700, 1200, 3)
    assert share(image[:20], LIGHT) > 0.99
    assert share(image[60:260], PASSED_TINT) > 0.3
    assert share(image, FAILED_TINT) < 0.001
    assert share(image[260:], BAR) > 0.005  # histograms
    assert share(image[260:], CURVE_DOT) > 0.0003  # layers and scatter


def test_a_failed_page_is_red_first(tmp_path: Path) -> None:
    image = shoot(page(tmp_path, error=0.5), tmp_path)
    assert share(image[60:260], FAILED_TINT) > 0.3
    assert share(image, PASSED_TINT) < 0.01


def test_dark_mode_is_dark_and_still_readable(tmp_path: Path) -> None:
    image = shoot(page(tmp_path, error=1e-3), tmp_path, dark=True)
    assert share(image[:20], DARK) > 0.99
    assert image.mean() < 60
    assert (image.min(axis=2) > 200).mean() > 0.002  # text


def test_a_narrow_window_needs_no_sideways_scrolling(tmp_path: Path) -> None:
    """What stands beyond the right edge would be cut off: the margin stays empty all the way down."""
    image = shoot(page(tmp_path, error=1e-3), tmp_path, width=560, height=2400)
    assert share(image[:, -12:], LIGHT) > 0.999
