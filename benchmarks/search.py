"""What a search for an INT8 plan costs on EfficientNet-Lite0, and what it finds, under a budget of agreement.

    python benchmarks/search.py [--agreement 0.95] [--crops 3200] [--looks-on 1600] [--base fp16] [--seed 2] [--fresh]

The budget: the first choice is the float model's own, as often as `--agreement` says. Calibration and the verdict see
crops of different pictures of scikit-image; the search looks at other crops of calibration's pictures, and the
verdict's samples see the one plan that was chosen.

An evaluation is one plan run on onnxruntime over its samples: layers alone in INT8 on calibration crops, or a whole
plan on the search's crops. Ranking layers one at a time takes one for each layer, and the same looks behind it; that
side is counted, not run. `verdict` is the product's, which takes samples as independent; crops of one picture are not,
so `--by-picture` adds a bootstrap over pictures. `--seed` cuts other crops for the verdict, `--fresh` takes them of
three pictures that nothing was developed on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trtforge
from trtforge.converter.progress import Event

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "configs"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from accuracy import BATCH, CALIBRATION, EVALUATION, FRESH, SIZE, crops, judge, logits  # beside this file
from example_models import efficientnet_lite0  # in the configurations' folder

LOOKS = CALIBRATION
"""The search looks at other crops of the pictures that calibration saw; the verdict sees none of those."""


def batches(names: tuple[str, ...], count: int, seed: int) -> Iterator[np.ndarray]:
    """Crops by eights, made anew each time: 3,200 of them are two gigabytes."""
    held: list[np.ndarray] = []
    for _, crop in crops(names, count, seed):
        held.append(crop)
        if len(held) == BATCH:
            yield np.stack(held)
            held = []


@dataclass(frozen=True)
class Verdict:
    """The crops that the budget is judged on."""

    pictures: tuple[str, ...]
    count: int
    seed: int


def measure(agreement: float, verdict: Verdict, looks: int, base: str, place: Path) -> dict[str, Any]:
    """Converts under the budget, and tells what was found and what it cost."""
    start = time.perf_counter()
    spent: dict[str, float] = {}

    def listen(event: Event) -> None:
        if event.kind == "end":
            spent[event.stage] = round(spent.get(event.stage, 0.0) + event.seconds, 1)
        elif event.kind == "note":
            print(f"{time.perf_counter() - start:6.0f} s  {event.text}", file=sys.stderr)

    torch.manual_seed(0)
    try:
        artifact = trtforge.convert(
            efficientnet_lite0().eval(),
            torch.from_numpy(next(batches(CALIBRATION, BATCH, seed=1))),
            place,
            precision={"default": "int8", "base": base},
            dims={"batch": (1, BATCH, BATCH)},
            inputs={"inputs": ("batch", 3, SIZE, SIZE)},
            calibration=lambda: batches(CALIBRATION, 128, seed=1),
            validation=lambda: batches(CALIBRATION, 32, seed=1),
            accuracy={
                "metric": "top1",
                "labels": "model",
                "max_drop": round(1 - agreement, 6),
                "data": lambda: batches(verdict.pictures, verdict.count, verdict.seed),
            },
            search={"data": lambda: batches(LOOKS, looks, seed=3)},
            on_event=listen,
        )
    except trtforge.ParityError as error:
        print(error, file=sys.stderr)
        artifact = trtforge.open_artifact(place.with_name(place.name + ".failed"))
    seconds = time.perf_counter() - start
    (row,) = artifact.facts["search"]["candidates"]
    (result,) = artifact.facts["accuracy"]["results"]
    shares = row["shares"] or {}
    return {
        "asked": agreement,
        "status": artifact.status,
        "evaluations": row["evaluations"],
        "looks": row["looks"],
        "one_at_a_time": row["layers"] + row["looks"],
        "layers": row["layers"],
        "in_float": len(row["kept_back"]),
        "macs_int8": round(shares.get("int8", 0.0), 4),
        "search": {"passed": row["passed"], "said": row["reason"], "at_first": row["unmended"]},
        "tried": [
            {
                "in_float": look["kept_back"],
                "macs_int8": round((look["shares"] or {}).get("int8", 0.0), 4),
                "agreement": round(look["accuracy"], 4),
                "foreseen_drop": round(look["drop_upper"], 4),
                "passed": look["passed"],
            }
            for look in row["tried"]
            if look["accuracy"] is not None
        ],
        "verdict": {key: result[key] for key in ("verdict", "samples", "candidate", "lower", "upper", "reason")},
        "kept_back": row["kept_back"],
        "seconds": {"all": round(seconds, 1), **spent},
    }


def by_picture(artifact: Path, verdict: Verdict) -> dict[str, Any]:
    """The same agreement with a bootstrap over pictures: another run of both models over the verdict's crops."""
    named = list(crops(verdict.pictures, verdict.count, verdict.seed))
    data = [np.stack([crop for _, crop in named[start : start + BATCH]]) for start in range(0, verdict.count, BATCH)]
    opened = trtforge.open_artifact(artifact)
    return judge(logits(opened.reference, data), logits(opened.model, data), named)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agreement", type=float, nargs="*", default=[0.95])
    parser.add_argument("--crops", type=int, default=3200, help="of the verdict")
    parser.add_argument("--seed", type=int, default=2, help="of the verdict's crops")
    parser.add_argument("--fresh", action="store_true", help="judged on pictures that nothing was developed on")
    parser.add_argument("--looks-on", type=int, default=1600, help="crops that the search looks at")
    parser.add_argument("--base", default="fp16", help="what runs around the INT8 layers")
    parser.add_argument("--by-picture", action="store_true", help="also a bootstrap over pictures")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    verdict = Verdict(FRESH if options.fresh else EVALUATION, options.crops, options.seed)
    found = []
    for agreement in options.agreement:
        with tempfile.TemporaryDirectory() as name:
            place = Path(name) / "int8"
            found.append(measure(agreement, verdict, options.looks_on, options.base, place))
            if options.by_picture:
                place = place if place.is_dir() else place.with_name("int8.failed")
                found[-1]["by_picture"] = by_picture(place, verdict)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for line in found:
        print("\n".join(f"{key}: {value}" for key, value in line.items()))


if __name__ == "__main__":
    main()
