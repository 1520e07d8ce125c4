"""`report.html`: one page for people, drawn from `ReportData`; it needs no network and runs no script."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from trtforge.runtime.errors import ArtifactError
from trtforge.validation.parity import OutputResult, ParityReport, Stage, Verdict
from trtforge.validation.report import ReportData
from trtforge.validation.tolerance import SAMPLE_LEEWAY_DB, Tolerance

__all__ = ["render_page", "write_page"]

_STAGES: Mapping[Stage, tuple[str, str]] = {
    "export": ("Export", "reference.onnx on onnxruntime"),
    "precision": ("Precision", "model.onnx, the plan carried out, on onnxruntime"),
    "engine": ("Engine", "model.engine on the GPU"),
}
_VERDICTS: Mapping[Verdict, tuple[str, str]] = {
    Verdict.PASSED: ("✓", "Proved equal"),
    Verdict.FAILED: ("✗", "Not equal"),
    Verdict.NOT_PROVED: ("?", "Not proved"),
}
_DECIBEL_TOP = 140.0
"""Right end of the SQNR bars: float32's own rounding."""
_SHOWN_SAMPLES = 200
_SHOWN_POWERS = 40


@dataclass(frozen=True, slots=True)
class _Bar:
    """One column of a histogram, in percent of its box; `beyond` the greatest error that is asked."""

    left: float
    width: float
    height: float
    label: str
    beyond: bool


@dataclass(frozen=True, slots=True)
class _Histogram:
    bars: tuple[_Bar, ...]
    low: str
    high: str
    limit: float | None


def render_page(data: ReportData) -> str:
    """The page as text. Equal data give equal pages."""
    symbol, headline = _VERDICTS[data.proof.verdict]
    return _template().render(
        data=data,
        facts=_Facts(data.facts),
        proof=data.proof,
        symbol=symbol,
        headline=headline,
        summary=_summary(data),
        stages=_STAGES,
        verdicts=_VERDICTS,
        histogram=_histogram,
        shown_samples=_SHOWN_SAMPLES,
        leeway=SAMPLE_LEEWAY_DB,
    )


def write_page(data: ReportData, path: Path) -> None:
    """Writes the page. Raises `ArtifactError` where it cannot."""
    try:
        path.write_text(render_page(data), encoding="utf-8", newline="\n")
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "decibel": _decibel,
        "number": _number,
        "shape": _shape,
        "plain": _plain,
        "size": _size,
        "share": _share,
        "asked": _asked,
        "code": _code,
    }
    return environment.get_template("report.html.j2")


class _Facts(dict[str, Any]):
    """Facts that are absent are None in the template."""

    def __missing__(self, key: str) -> None:
        return None


def _summary(data: ReportData) -> str:
    deciding = data.proof.deciding
    if not deciding:
        return "Nothing was compared."
    # Where the chain fails, the report that made it fail; else the last one.
    failing = [report for report in deciding if not report.passed and report.verdict is data.proof.verdict]
    last = failing[0] if failing else deciding[-1]
    candidate = last.candidate
    subject = {"export": "The exported ONNX", "precision": "The converted ONNX", "engine": "The engine"}
    measured = [o.pooled.sqnr_db for o in last.outputs if o.pooled is not None and "float" in o.dtype]
    worst = min(measured, default=None)
    relation = {
        Verdict.PASSED: "agrees with",
        Verdict.FAILED: "does not agree with",
        Verdict.NOT_PROVED: "is not proved to agree with",
    }
    text = (
        f"{subject[candidate.stage]} ({candidate.precision}, {candidate.runner} {candidate.version}) "
        f"{relation[last.verdict]} {last.reference} over {_count(len(last.samples), 'sample')}"
    )
    if worst is not None:
        limit = last.tolerance.sqnr_db
        asked = f", {limit:g} dB asked" if limit is not None else ""
        text += f"; least SQNR {_decibel(worst)}{asked}"
    return text + "."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _decibel(value: float) -> str:
    if math.isinf(value):
        return "exact" if value > 0 else "-∞ dB"
    return f"{value:.1f} dB" if not math.isnan(value) else "NaN"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "-∞"}.get(value, "NaN")
    return f"{value:.4g}"


def _share(value: float) -> float:
    """Where a SQNR stands on its bar, 0 to 100."""
    if math.isnan(value):
        return 0.0
    return 100 * min(max(value / _DECIBEL_TOP, 0.0), 1.0)


def _asked(tolerance: Tolerance) -> str:
    limits = []
    if tolerance.sqnr_db is not None:
        limits.append(f"SQNR ≥ {tolerance.sqnr_db:g} dB ({tolerance.sqnr_db - SAMPLE_LEEWAY_DB:g} in one sample alone)")
    if tolerance.cosine is not None:
        limits.append(f"cosine ≥ {tolerance.cosine:g}")
    if tolerance.max_abs_over_std is not None:
        limits.append(f"greatest error ≤ {tolerance.max_abs_over_std:g} standard deviations")
    if tolerance.elementwise:
        limits.append(f"every error ≤ {tolerance.atol or 0:g} + {tolerance.rtol or 0:g} |r|")
    limits.append(f"at most {tolerance.mismatch:.2%} of integers differ" if tolerance.mismatch else "integers equal")
    return ", ".join(limits) + "."


def _code(text: str) -> markupsafe.Markup:
    """Escaped text with what stands in backticks as code."""
    parts = (markupsafe.escape(part) for part in text.split("`"))
    return markupsafe.Markup("").join(
        markupsafe.Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def _shape(dims: Sequence[int | str]) -> str:
    return "\N{MULTIPLICATION SIGN}".join(str(dim) for dim in dims) or "scalar"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _histogram(output: OutputResult, report: ParityReport) -> _Histogram | None:
    """Errors in powers of two of the output's standard deviation."""
    pooled = output.pooled
    if pooled is None or pooled.std == 0 or len(output.exponents) < 2:
        return None
    first, last = output.exponents[0][0], output.exponents[-1][0]
    first = max(first, last - _SHOWN_POWERS)
    width = 100 / (last - first + 1)
    # A root, since one value in a million that is wrong has to be seen beside the hill of rounding.
    top = max(count for _, count in output.exponents) ** 0.25
    shift = math.log2(pooled.std)
    limit = report.tolerance.max_abs_over_std
    bars = tuple(
        _Bar(
            left=round((exponent - first) * width, 3),
            width=round(width * 0.92, 3),
            height=round(96 * count**0.25 / top, 3),
            label=f"{count} values, 2^{exponent - 1 - shift:.1f} to 2^{exponent - shift:.1f} standard deviations",
            beyond=limit is not None and 2.0 ** (exponent - 1) > limit * pooled.std,
        )
        for exponent, count in output.exponents
        if exponent >= first
    )
    place = None if limit is None else (math.log2(limit) + shift - (first - 1)) * width
    return _Histogram(
        bars,
        low=_power(first - 1 - shift),
        high=_power(last - shift),
        limit=round(place, 3) if place is not None and 0 <= place <= 100 else None,
    )


def _power(exponent: float) -> str:
    return f"{2.0**exponent:.1e}"
