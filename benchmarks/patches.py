"""A vision transformer with its patch embedding as one matrix product (as exported) and as the convolution it was.

    python benchmarks/patches.py [--model vit_b_16] [--batches 1 32] [--precision fp16] [--rounds 9] [--json FILE]

On the GPU machine. Both engines hold the same weights, are proved, and replay their CUDA graphs by turns in one
process; the milliseconds are medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "configs")]


def make_artifact(name: str, batch: int, precision: str, place: Path, *, products: bool) -> Any:
    import peers  # benchmarks/peers.py

    import trtforge

    # The one line of the export that is measured.
    rewrite = "trtforge.converter.export.multiply_patches"
    with contextlib.nullcontext() if products else mock.patch(rewrite, return_value=False):
        return trtforge.convert(peers.make_model(name), peers.make_inputs(name, batch), place, precision=precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_b_16")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="one object a line")
    options = parser.parse_args()
    for batch in options.batches:
        with tempfile.TemporaryDirectory() as work:
            artifacts = {
                form: make_artifact(
                    options.model, batch, options.precision, Path(work) / form, products=form == "product"
                )
                for form in ("product", "convolution")
            }
            row = time_forms(artifacts, options.model, batch, options.rounds)
        times = ", ".join(f"{form} {ms:.4f} ms" for form, ms in row.items())
        ratio = row["convolution"] / row["product"]
        print(f"{options.model} batch {batch}: {times}, convolution / product {ratio:.3f}")
        if options.json:
            with options.json.open("a") as file:
                file.write(json.dumps({"model": options.model, "batch": batch, **row}) + "\n")


def time_forms(artifacts: dict[str, Any], name: str, batch: int, rounds: int) -> dict[str, float]:
    import engine as one  # benchmarks/engine.py
    import peers

    given = [x.cuda() for x in peers.make_inputs(name, batch)]
    calls = {}
    for form, artifact in artifacts.items():
        assert artifact.engine is not None
        feeds = dict(zip([spec.name for spec in artifact.inputs], given, strict=True))
        calls[form] = one.bare(artifact.engine, feeds, False)[0]
    return one.measure_throughput(calls, rounds, least_ms=60.0)


if __name__ == "__main__":
    main()
