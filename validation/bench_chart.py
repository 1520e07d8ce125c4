"""The plot of `trtforge bench`: throughput of every side, case by case."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from trtforge.validation import charts

__all__ = ["throughput_chart"]

_ROW = 18
_GAP = 10
_LEFT = 150
_WIDTH = 920


def throughput_chart(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Bars of items a second, each case on a scale of its own: its fastest side is the full width.

    Args:
        rows: `case`, `side`, `items_per_second` and `median_ms`, cases one after the other.
    """
    if not rows:
        return Markup("")
    room = _WIDTH - _LEFT - 130
    y = 4.0
    body = []
    for case, members in itertools.groupby(rows, key=lambda row: str(row["case"])):
        group = list(members)
        fastest = max(float(row["items_per_second"]) for row in group)
        body.append(charts.text_at(0, y + 13, case, "title"))
        y += _ROW
        for row in group:
            speed, side = float(row["items_per_second"]), str(row["side"])
            width = max(room * speed / fastest, 1.0)
            label = f"{side}: {speed:,.0f} items a second, median latency {float(row['median_ms']):.3f} ms"
            body.append(charts.text_at(_LEFT - 6, y + 12, side, "tick end"))
            kind = "bar" if side.startswith("engine") else "bar peer"
            body.append(charts.rect_at(_LEFT, y + 2, width, _ROW - 4, kind, label))
            body.append(charts.text_at(_LEFT + width + 5, y + 12, f"{speed:,.0f}/s", "tick"))
            y += _ROW
        y += _GAP
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        _WIDTH, round(y), "Throughput of every side"
    )
    return Markup("").join([head, *body, Markup("</svg>")])
