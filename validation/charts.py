"""Charts for pages, as inline SVG: text that can be selected, colours from the page's variables, no script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from trtforge.validation.parity import OutputResult
from trtforge.validation.tolerance import Tolerance

__all__ = ["error_histogram", "error_scatter", "layer_curve", "pareto", "range_histogram", "rect_at", "text_at"]

_POWERS = 40
"""Powers of two that a histogram of errors reaches below the greatest error."""
_DOTS = 1500
"""Layers that a curve has dots for, before only the worst keep theirs."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """A plot's box in user units, and the data ranges that it shows."""

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 46
    right: float = 12
    top: float = 10
    bottom: float = 34

    def px(self, value: float) -> float:
        """The place of a data value from left to right, within the box."""
        low, high = self.x
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.left + min(max(share, 0), 1) * (self.width - self.left - self.right), 1)

    def py(self, value: float) -> float:
        """The place of a data value from top to bottom, within the box."""
        low, high = self.y
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.height - self.bottom - min(max(share, 0), 1) * (self.height - self.top - self.bottom), 1)

    def draw(
        self,
        label: str,
        body: Iterable[Markup],
        xs: Sequence[tuple[float, str]],
        ys: Sequence[tuple[float, str]],
        x_title: str,
        y_title: str = "",
    ) -> Markup:
        """The whole chart: grid, ticks (place and text), titles, and `body` on top."""
        base, end = self.height - self.bottom, self.width - self.right
        parts = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            _n(self.width), _n(self.height), label)]  # fmt: skip
        for value, text in ys:
            y = self.py(value)
            parts.append(_line(self.left, y, end, y, "grid"))
            parts.append(text_at(self.left - 6, y + 3.5, text, "tick end"))
        for value, text in xs:
            x = self.px(value)
            parts.append(_line(x, base, x, base + 4, "axis"))
            parts.append(text_at(x, base + 15, text, "tick mid"))
        parts.append(_line(self.left, base, end, base, "axis"))
        parts.extend(body)
        parts.append(text_at((self.left + end) / 2, self.height - 4, x_title, "title mid"))
        if y_title:
            parts.append(text_at(self.left, self.top - 1, y_title, "title"))
        return Markup("").join([*parts, Markup("</svg>")])


def error_histogram(output: OutputResult, tolerance: Tolerance) -> Markup:
    """Counts of |error| by powers of two of the output's standard deviation; "" where there is nothing to show."""
    pooled = output.pooled
    if pooled is None or not pooled.std or not math.isfinite(pooled.std) or not output.exponents:
        return Markup("")
    shift = math.log2(pooled.std)
    last = output.exponents[-1][0]
    shown = [(exponent, count) for exponent, count in output.exponents if exponent > last - _POWERS]
    limit = tolerance.max_abs_over_std
    ends = [shown[0][0] - 1 - shift, last - shift]
    if limit is not None and limit > 0:
        ends.append(math.log2(limit))
    top = math.log10(max(count for _, count in shown))
    frame = _Frame(440, 190, (min(ends) - 0.5, max(ends) + 0.5), (-0.3, max(top, 0.3) * 1.06))
    body = []
    for exponent, count in shown:
        low, high = frame.px(exponent - 1 - shift), frame.px(exponent - shift)
        y = frame.py(math.log10(count))
        beyond = limit is not None and 2.0 ** (exponent - 1 - shift) > limit
        label = f"{count} values err by {2.0 ** (exponent - 1 - shift):.2g} to {2.0 ** (exponent - shift):.2g} std"
        kind = "bar beyond" if beyond else "bar"
        body.append(rect_at(low + 0.5, y, high - low - 1, frame.height - frame.bottom - y, kind, label))
    body += _limit(frame, math.log2(limit) if limit else None, "asked")
    ys = [(n, _power(n)) for n in range(math.ceil(top) + 1) if n <= top * 1.06 or n == 0]
    label = f"Distribution of errors of {output.name}"
    return frame.draw(label, body, _twos(frame.x), _thin(ys, 5), "|error| / std of the output", "values")


def error_scatter(output: OutputResult, precision: str = "") -> Markup:
    """Error against the size of the value that it is an error of, rms and greatest; "" where there is none.

    Args:
        output: With its `magnitudes`.
        precision: Of the candidate; for fp16 and bf16 a line shows what rounding the value once would cost.
    """
    shown = [m for m in output.magnitudes if m.greatest > 0 and m.exponent > -64]
    if len(shown) < 2:
        return Markup("")
    logs = [math.log2(m.greatest) for m in shown] + [math.log2(m.rms) for m in shown if m.rms > 0]
    frame = _Frame(440, 190, (shown[0].exponent - 1, shown[-1].exponent), (min(logs) - 1, max(logs) + 1))
    body = []
    bits = {"fp16": 11, "bf16": 8}.get(precision)  # rounding once: half a unit in the last place, |r| * 2^-bits
    if bits is not None:
        low, high = max(frame.x[0], frame.y[0] + bits), min(frame.x[1], frame.y[1] + bits)
        if high - low > 2:
            body.append(_line(frame.px(low), frame.py(low - bits), frame.px(high), frame.py(high - bits), "guide"))
            # Beside the line's lower end, where errors seldom are.
            right = frame.px(low) < frame.width / 2
            place = frame.px(low) + (14 if right else -6), frame.py(low - bits) - 5
            body.append(text_at(*place, f"rounding once to {precision}", "note" if right else "note end"))
    for m in shown:
        x = frame.px(m.exponent - 0.5)
        label = f"{m.count} values of {2.0 ** (m.exponent - 1):.2g} to {2.0**m.exponent:.2g}: "
        label += f"rms {m.rms:.2g}, greatest {m.greatest:.2g}"
        if m.rms > 0:
            body.append(_line(x, frame.py(math.log2(m.rms)), x, frame.py(math.log2(m.greatest)), "whisker"))
            body.append(_dot(x, frame.py(math.log2(m.rms)), 3.2, "dot", label))
        body.append(_dot(x, frame.py(math.log2(m.greatest)), 2, "dot hollow", label))
    label = f"Error of {output.name} against its magnitude"
    return frame.draw(label, body, _twos(frame.x), _twos(frame.y, 5), "|value|", "error: rms ●  greatest ○")


def layer_curve(layers: Sequence[Mapping[str, Any]], asked: float | None = None) -> Markup:
    """SQNR after each layer in order of execution; what is equal stands at the top, NaN and Inf at the bottom."""
    if len(layers) < 2:
        return Markup("")
    values = [float(layer["sqnr_db"]) for layer in layers]
    finite = [value for value in values if math.isfinite(value)]
    low = min([*finite, asked if asked is not None else 0.0, 0.0])
    high = max([*finite, 40.0]) * 1.05
    frame = _Frame(920, 260, (0, len(layers) - 1), (low - 4, high), left=46)
    points = [(frame.px(i), frame.py(_bounded(value, frame.y))) for i, value in enumerate(values)]
    body = [Markup('<polyline class="curve" points="{}"/>').format(" ".join(f"{_n(x)},{_n(y)}" for x, y in points))]
    if asked is not None:
        y = frame.py(asked)
        body.append(_line(frame.left, y, frame.width - frame.right, y, "limit"))
    worst = sorted(range(len(values)), key=lambda index: values[index])[:_DOTS]
    for index in sorted(worst):
        layer, (x, y) = layers[index], points[index]
        text = f"{layer['node']} ({layer['op']}): {_decibels(values[index])}"
        kind = "dot beyond" if asked is not None and values[index] < asked else "dot"
        body.append(_dot(x, y, 2.6, kind, text))
    if asked is not None:  # over the dots, which would hide it
        text = f"asked of the outputs: {asked:g} dB"
        body.append(text_at(frame.width - frame.right, frame.py(asked) - 4, text, "note end red"))
    xs = [(round(i * (len(layers) - 1) / 8), str(round(i * (len(layers) - 1) / 8) + 1)) for i in range(9)]
    xs = list(dict.fromkeys(xs))
    ys = [(float(y), f"{y}") for y in _steps(frame.y[0], frame.y[1], 6)]
    return frame.draw("Signal to noise after each layer", body, xs, ys, "layer, in order of execution", "SQNR, dB")


def range_histogram(entry: Mapping[str, Any]) -> Markup:
    """One tensor's calibration histogram (`counts` of |x| in bins of `width`), and its threshold `amax`."""
    counts, width = list(entry["counts"]), float(entry["width"])
    if not counts or max(counts) <= 0:
        return Markup("")
    end = max(width * len(counts), float(entry["amax"]))
    top = math.log10(max(counts))
    frame = _Frame(250, 120, (0, end), (-0.3, max(top, 0.3) * 1.1), left=4, right=4, top=6, bottom=26)
    path = [f"M{_n(frame.px(0))} {_n(frame.height - frame.bottom)}"]
    for index, count in enumerate(counts):
        y = frame.py(math.log10(count)) if count else frame.height - frame.bottom
        path.append(f"V{_n(y)}H{_n(frame.px((index + 1) * width))}")
    path.append(f"V{_n(frame.height - frame.bottom)}Z")
    body = [Markup('<path class="area" d="{}"/>').format("".join(path))]
    x = frame.px(float(entry["amax"]))
    body.append(_line(x, frame.top, x, frame.height - frame.bottom, "limit"))
    edge, base = frame.width - frame.right, frame.height - frame.bottom
    body.append(text_at(frame.left, base + 12, "0", "note"))
    body.append(text_at(edge, base + 12, f"{end:.3g}", "note end"))
    return frame.draw(f"Values of {entry['name']}", body, [], [], f"|x|, range ends at {float(entry['amax']):.4g}")


def pareto(candidates: Sequence[Mapping[str, Any]], chosen: str | None = None) -> Markup:
    """Accuracy, or SQNR where no budget asks for it, against latency, or size where nothing was timed.

    The front of what passes is joined, what failed is hollow; "" with fewer than two to compare.
    """
    timed = any(candidate.get("latency_ms") is not None for candidate in candidates)
    scored = any(candidate.get("accuracy") is not None for candidate in candidates)
    key, figure = "latency_ms" if timed else "size_bytes", "accuracy" if scored else "sqnr_db"
    shown = [c for c in candidates if c.get(key) is not None and math.isfinite(float(c.get(figure) or "nan"))]
    if len(shown) < 2:
        return Markup("")
    scale = 1.0 if timed else 1 / (1 << 20)
    xs, ys = [float(c[key]) * scale for c in shown], [float(c[figure]) for c in shown]
    frame = _Frame(920, 320, _padded(xs, from_zero=True), _padded(ys), left=60)
    label = "accuracy" if scored else "SQNR, dB"
    front: list[tuple[float, float]] = []
    passed = [(x, y) for c, x, y in zip(shown, xs, ys, strict=True) if c["passed"]]
    for x, y in sorted(passed, key=lambda point: (point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    steps = " ".join(f"{_n(frame.px(x))},{_n(frame.py(y))}" for x, y in front)
    body = [Markup('<polyline class="front" points="{}"/>').format(steps)]
    for candidate, x, y in zip(shown, xs, ys, strict=True):
        kind = "dot big" if candidate["passed"] else "dot big hollow"
        if candidate["name"] == chosen:
            kind += " chosen"
        kept = candidate.get("kept_back") or []
        count = kept if isinstance(kept, int) else len(kept)
        text = f"{candidate['name']}: {x:.4g} {'ms' if timed else 'MiB'}, {label} {y:.5g}, {count} layers kept back"
        body.append(_dot(frame.px(x), frame.py(y), 5.5, kind, text))
        right = frame.px(x) > frame.width * 0.8
        body.append(
            text_at(
                frame.px(x) + (-9 if right else 9),
                frame.py(y) + 4,
                str(candidate["name"]),
                "mark" + (" end" if right else ""),
            )
        )
    x_ticks = [(v, f"{v:.4g}") for v in _steps(*frame.x, 7)]
    y_ticks = [(v, f"{v:.4g}") for v in _steps(*frame.y, 6)]
    return frame.draw("Candidates", body, x_ticks, y_ticks, "latency, ms" if timed else "size, MiB", label)


def _limit(frame: _Frame, value: float | None, text: str) -> list[Markup]:
    if value is None or not frame.x[0] <= value <= frame.x[1]:
        return []
    x = frame.px(value)
    right = x > frame.width / 2
    return [
        _line(x, frame.top, x, frame.height - frame.bottom, "limit", "greatest error asked"),
        text_at(x + (-4 if right else 4), frame.top + 9, text, "note red" + (" end" if right else "")),
    ]


def _twos(span: tuple[float, float], count: int = 7) -> list[tuple[float, str]]:
    """Ticks on an axis of binary logarithms: powers of ten, and their twos and fives where those are too few."""
    low, high = span[0] * math.log10(2), span[1] * math.log10(2)
    tens = [(n / math.log10(2), _power(n)) for n in _steps(low, high, count) if n == int(n)]
    if len(tens) > 2:
        return tens
    places = [(n, factor) for n in range(math.floor(low), math.ceil(high) + 1) for factor in (1, 2, 5)]
    logs = [(n + math.log10(factor), factor * 10.0**n) for n, factor in places]
    return [(log / math.log10(2), f"{value:.3g}") for log, value in logs if low <= log <= high][:count]


def _steps(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers within [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step)
    found = [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]
    return [int(value) if value == int(value) else value for value in found]


def _padded(values: Sequence[float], *, from_zero: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    return (0.0 if from_zero else low - room, high + room)


def _thin(ticks: list[tuple[int, str]], count: int) -> list[tuple[float, str]]:
    step = max(1, -(-len(ticks) // count))
    return [(float(value), text) for value, text in ticks[::step]]


def _bounded(value: float, span: tuple[float, float]) -> float:
    return span[1] if value > span[1] else span[0] if not value >= span[0] else value


def _decibels(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else ("equal" if value > 0 else "NaN or Inf")


def _power(exponent: float) -> str:
    whole = int(exponent)
    if -3 < whole < 5:
        return f"{10.0**whole:g}"
    return "10" + "".join("⁻" if c == "-" else "⁰¹²³⁴⁵⁶⁷⁸⁹"[int(c)] for c in str(whole))


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, title: str = "") -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}">{}</line>').format(
        kind, _n(x1), _n(y1), _n(x2), _n(y2), _title(title)
    )


def text_at(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, _n(x), _n(y), text)


def _dot(x: float, y: float, radius: float, kind: str, title: str) -> Markup:
    return Markup('<circle class="{}" cx="{}" cy="{}" r="{}">{}</circle>').format(
        kind, _n(x), _n(y), _n(radius), _title(title)
    )


def rect_at(x: float, y: float, width: float, height: float, kind: str, title: str) -> Markup:
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="1">{}</rect>').format(
        kind, _n(x), _n(y), _n(max(width, 1)), _n(max(height, 1)), _title(title)
    )


def _title(text: str) -> Markup:
    return Markup("<title>{}</title>").format(text) if text else Markup(escape(""))
