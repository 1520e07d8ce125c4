"""`report.html`: one page for people, drawn from `ReportData`; it needs no network and runs no script."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from trtforge.runtime.errors import ArtifactError
from trtforge.validation import charts
from trtforge.validation.accuracy import AccuracyReport, AccuracyVerdict
from trtforge.validation.bench_chart import throughput_chart
from trtforge.validation.parity import Stage, Verdict
from trtforge.validation.report import ReportData
from trtforge.validation.tolerance import SAMPLE_LEEWAY_DB, Tolerance

__all__ = ["render_page", "summarize", "template", "write_page"]

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
_ACCURACY: Mapping[AccuracyVerdict, tuple[str, str]] = {
    "passed": ("✓", "Within its accuracy budget"),
    "failed": ("✗", "Beyond its accuracy budget"),
    "inconclusive": ("?", "Accuracy not shown"),
}
_CLASSES: Mapping[AccuracyVerdict, str] = {"passed": "passed", "failed": "failed", "inconclusive": "not_proved"}
_DECIBEL_TOP = 140.0
"""Right end of the SQNR bars: float32's own rounding."""
_SHOWN_SAMPLES = 200
_SHOWN_RANGES = 48
_SHOWN_LAYERS = 400
_SHOWN_EXCEPTIONS = 60


def render_page(data: ReportData) -> str:
    """The page as text. Equal data give equal pages."""
    symbol, headline = _VERDICTS[data.proof.verdict]
    kind = data.proof.verdict.value
    accuracy = _read_accuracy(data)
    if accuracy is not None and accuracy.deciding is not None and data.proof.passed and not accuracy.passed:
        symbol, headline = _ACCURACY[accuracy.deciding.verdict]
        kind = _CLASSES[accuracy.deciding.verdict]
    return template("report.html.j2").render(
        kind=kind,
        accuracy=accuracy,
        accuracy_words=_ACCURACY,
        accuracy_classes=_CLASSES,
        data=data,
        facts=_Facts(data.facts),
        proof=data.proof,
        symbol=symbol,
        headline=headline,
        summary=summarize(data),
        stages=_STAGES,
        verdicts=_VERDICTS,
        tiles=_tiles(data),
        parts=_parts(data),
        asked_db=_asked_db(data),
        full_db=f"{_DECIBEL_TOP:g}",
        worst_layers=sorted(data.facts.get("layers") or (), key=lambda layer: float(layer["sqnr_db"])),
        ranges=[
            _Facts(entry)
            for entry in sorted(data.facts.get("ranges") or (), key=lambda e: float(e.get("sqnr_db", math.inf)))
        ],
        search=_search(data),
        fused_nodes=sum(len(layer["nodes"]) for layer in data.facts.get("engine_layers") or ()),
        error_histogram=charts.error_histogram,
        error_scatter=charts.error_scatter,
        layer_curve=charts.layer_curve,
        range_histogram=charts.range_histogram,
        pareto=charts.pareto,
        bench=_bench(data),
        throughput=throughput_chart,
        shown_samples=_SHOWN_SAMPLES,
        shown_ranges=_SHOWN_RANGES,
        shown_layers=_SHOWN_LAYERS,
        shown_exceptions=_SHOWN_EXCEPTIONS,
        leeway=SAMPLE_LEEWAY_DB,
    )


def write_page(data: ReportData, path: Path) -> None:
    """Writes the page. Raises `ArtifactError` where it cannot."""
    try:
        path.write_text(render_page(data), encoding="utf-8", newline="\n")
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror or error}",
            fix="free space or give permission there, or choose another --output",
        ) from error


@functools.cache
def template(name: str) -> jinja2.Template:
    """A template of this package, with the filters that pages share."""
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
    return environment.get_template(name)


def _read_accuracy(data: ReportData) -> AccuracyReport | None:
    found = data.facts.get("accuracy")
    return AccuracyReport.from_json(found) if found else None


class _Facts(dict[str, Any]):
    """Facts that are absent are None in the template."""

    def __missing__(self, key: str) -> None:
        return None


def summarize(data: ReportData) -> str:
    """The verdict in one sentence, with the figures that decide it."""
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


def _search(data: ReportData) -> Mapping[str, Any]:
    search = _Facts(data.facts.get("search") or {})
    return _Facts({**search, "candidates": [_Facts(candidate) for candidate in search["candidates"] or ()]})


def _tiles(data: ReportData) -> list[tuple[str, str]]:
    """The figures that one looks for first: each with what it is."""
    tiles = []
    deciding = data.proof.deciding
    measured = (
        [o.pooled for o in deciding[-1].outputs if o.pooled is not None and "float" in o.dtype] if deciding else []
    )
    if measured:
        tiles.append((_decibel(min(m.sqnr_db for m in measured)), "least SQNR of an output"))
        tiles.append((_number(max(m.max_abs_over_std for m in measured)), "greatest error, in std"))
        tiles.append((str(len(deciding[-1].samples)), "samples compared"))
    engine = data.facts.get("engine") or {}
    if "size" in engine:
        tiles.append(
            (_size(engine["size"]), f"engine, {engine.get('backend', '')} {engine.get('version', '')}".strip())
        )
    nodes = sum(exception.nodes for exception in data.exceptions)
    if nodes:
        tiles.append((str(nodes), f"nodes kept out of {data.facts.get('precision', 'the default')}"))
    if ranges := data.facts.get("ranges"):
        tiles.append((str(len(ranges)), "tensors calibrated"))
    return tiles


def _parts(data: ReportData) -> list[tuple[str, str]]:
    """The page's sections by anchor."""
    facts = data.facts
    search = facts.get("search") or {}
    present = {
        "accuracy": ("Accuracy", facts.get("accuracy")),
        "outputs": ("Outputs", data.proof.reports),
        "layers": ("Layers", facts.get("layers")),
        "search": ("Search", search.get("candidates")),
        "bench": ("Speed", (facts.get("bench") or {}).get("rows")),
        "calibration": ("Calibration", facts.get("ranges")),
        "engine": ("Engine", facts.get("engine_layers")),
        "shapes": ("Shapes", True),
        "plan": ("Precision plan", True),
        "versions": ("Versions and hashes", True),
        "reproduce": ("Reproduce", facts.get("command") or data.commands),
    }
    return [(anchor, title) for anchor, (title, there) in present.items() if there]


def _bench(data: ReportData) -> Mapping[str, Any]:
    bench = data.facts.get("bench") or {}
    return _Facts({"absent": {}, **bench, "rows": [_Facts(row) for row in bench.get("rows") or ()]})


def _asked_db(data: ReportData) -> float | None:
    deciding = data.proof.deciding
    return deciding[-1].tolerance.sqnr_db if deciding else None


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
