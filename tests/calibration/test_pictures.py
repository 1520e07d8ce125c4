from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from trtforge.calibration.auto import choose_range
from trtforge.calibration.histogram import Histogram
from trtforge.calibration.pictures import draw_histogram, write_page
from trtforge.calibration.ranges import Ranges, TensorRange
from trtforge.runtime.errors import ArtifactError


def histogram_of(array: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.add(array.astype(np.float32))
    return histogram


def test_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    histograms = {"a<b>": histogram_of(rng.standard_normal(5000)), "zero": histogram_of(np.zeros(3))}
    histograms["worse"] = histogram_of(np.concatenate([rng.standard_normal(5000), [90.0]]))
    tensors = {name: choose_range(histogram, "max") for name, histogram in histograms.items()}
    tensors["imported"] = TensorRange(1.0, "imported")
    path = tmp_path / "new" / "page.html"
    write_page(path, Ranges(tensors), histograms, title="ResNet & co")
    text = path.read_text(encoding="utf-8")
    assert "ResNet &amp; co" in text
    assert "a&lt;b&gt;" in text
    assert "<b>" not in text
    rows = re.findall(r"<tr><td>(.*?)<td>", text)
    assert rows[:2] == ["worse", "a&lt;b&gt;"]  # worst SQNR first
    assert set(rows[2:]) == {"zero", "imported"}
    assert text.count("<svg") == 3


def test_svg_is_xml_and_reproducible() -> None:
    histogram = histogram_of(np.random.default_rng(0).standard_normal(1000))
    found = choose_range(histogram)
    svg = draw_histogram(histogram, found)
    assert ET.fromstring(svg).tag.endswith("svg")
    assert draw_histogram(histogram, found) == svg


def test_page_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_page(tmp_path / "file" / "page.html", Ranges({}), {})
