"""A static page for people: every tensor's histogram with its threshold, and how well it fits."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trtforge.calibration.fit import LayerFit
from trtforge.calibration.histogram import Histogram
from trtforge.calibration.ranges import QuantFormat, Ranges, TensorRange
from trtforge.runtime.errors import ArtifactError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_histogram", "write_page"]

_COLUMNS = 128
_STYLE = """body{font:14px system-ui,sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse}
td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
figure{display:inline-block;margin:.5em;width:23em}figcaption{overflow-wrap:anywhere}svg{width:100%;height:auto}"""


def write_page(
    path: Path,
    ranges: Ranges,
    histograms: Mapping[str, Histogram],
    *,
    format: QuantFormat = "int8",
    title: str = "",
    layers: Sequence[LayerFit] = (),
) -> None:
    """Writes one HTML file that needs no other: a table of all tensors, worst SQNR first, and their histograms as SVG;
    and what fitting did to the weights of `layers`.

    Raises:
        ArtifactError: the file cannot be written.
        MissingDependencyError: matplotlib is not installed.
    """
    order = sorted(ranges.tensors, key=lambda name: _worst_first(ranges[name]))
    made = ranges.made_from
    heading = html.escape(title or "Calibration")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{heading}</title><style>{_STYLE}</style>",
        f"<h1>{heading}</h1>",
        f"<p>{len(order)} tensors, {made.samples} samples, method {html.escape(made.method)},",
        f"model {html.escape(made.graph[:12])}, onnxruntime {html.escape(made.provider)}.</p>",
        f"<table><tr><th>tensor<th>method<th>{format} scale<th>threshold<th>largest<th>clipped<th>SQNR (dB)</tr>",
        *(_row(name, ranges[name], format) for name in order),
        "</table>",
        *_fit_table(layers),
    ]
    for name in order:
        if name in histograms:
            picture = draw_histogram(histograms[name], ranges[name])
            parts.append(f"<figure>{picture}<figcaption>{html.escape(name)}</figcaption></figure>")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts) + "</html>\n", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error


def draw_histogram(histogram: Histogram, found: TensorRange) -> str:
    """One `<svg>` element: counts of |x| on a logarithmic scale, and the threshold as a line.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib is not installed", fix="pip install matplotlib") from error
    figure = Figure(figsize=(3.6, 1.8), layout="constrained")
    FigureCanvasSVG(figure)
    _plot(figure.add_subplot(), histogram, found)
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "trtforge"}):  # else every run gives other ids
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _plot(axes: Axes, histogram: Histogram, found: TensorRange) -> None:
    counts = histogram.counts[: histogram.used]
    step = -(-len(counts) // _COLUMNS)
    padded = np.concatenate([counts, np.zeros(-len(counts) % step, np.int64)])
    heights = padded.reshape(-1, step).sum(axis=1)
    edges = np.arange(len(heights) + 1) * step * histogram.width
    axes.stairs(heights, edges, fill=True, color="#7aa6c2")
    axes.axvline(found.amax, color="#c0392b", linewidth=1)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel(f"|x|, {found.method} at {found.amax:.4g}", fontsize=7)
    axes.tick_params(labelsize=6)


def _row(name: str, found: TensorRange, format: QuantFormat) -> str:
    cells = [
        html.escape(name),
        f'<span title="{html.escape(found.reason)}">{html.escape(found.method)}</span>',
        f"{found.scale(format):.6g}",
        f"{found.amax:.6g}",
        _show(found.peak, "{:.6g}"),
        _show(found.clipped_fraction, "{:.4%}"),
        _show(found.sqnr_db, "{:.1f}"),
    ]
    return "<tr>" + "".join(f"<td>{cell}" for cell in cells) + "</tr>"


def _fit_table(layers: Sequence[LayerFit]) -> list[str]:
    if not layers:
        return []
    head = "<h2>Weights</h2><table><tr><th>layer<th>nearest codes (dB)<th>fitted (dB)<th>bias shift / output std</tr>"
    rows = []
    for layer in layers:
        figures = (_show(layer.nearest_db, "{:.1f}"), _show(layer.fitted_db, "{:.1f}"), f"{layer.bias_shift:.4f}")
        rows.append("<tr>" + "".join(f"<td>{cell}" for cell in (html.escape(layer.node), *figures)) + "</tr>")
    return [head, *rows, "</table>"]


def _show(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _worst_first(found: TensorRange) -> float:
    return found.sqnr_db if found.sqnr_db is not None else float("inf")
