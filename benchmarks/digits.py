"""The digits CNN in INT8 and FP8: how many of the 450 labelled test images it gets right, beside the float model.

    python benchmarks/digits.py

Trains on the other 1,347 images (the same weights each time), converts `configs/digits_int8.yaml`, which calibrates on
those, and runs both graphs on onnxruntime, the quantized one with fake quantization.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "configs"), str(ROOT / "examples" / "digits")]

from example_models import digits_data  # noqa: E402  # the folders are put in the path above
from train import train  # noqa: E402  # likewise

from trtforge.converter.artifact import open_artifact  # noqa: E402  # likewise
from trtforge.converter.commands import convert  # noqa: E402  # likewise
from trtforge.runtime.onnx_runner import OnnxRuntimeRunner  # noqa: E402  # likewise

FORMATS = ("int8", "fp8")


def main() -> int:
    images, labels = digits_data("test")

    def right(model: Path) -> np.ndarray:
        logits = OnnxRuntimeRunner(model, disable_quant_qdq=True).run({"image": images})["logits"]
        return np.asarray(logits.argmax(1) == labels)

    torch_accuracy = train(ROOT / "examples" / "digits" / "digits.safetensors")
    with tempfile.TemporaryDirectory() as name:
        code = convert(
            ROOT / "configs" / "digits_int8.yaml", only=None, output=Path(name), jobs=1, force=True, as_json=False
        )
        if code:
            return code
        artifacts = {format: open_artifact(Path(name) / f"digits-{format}") for format in FORMATS}
        exact = right(artifacts["int8"].reference)
        results: dict[str, object] = {"images": len(labels), "pytorch": torch_accuracy, "fp32": float(exact.mean())}
        for format, artifact in artifacts.items():
            found = right(artifact.model)
            results[format] = {
                "accuracy": float(found.mean()),
                "points_below_fp32": 100 * float(exact.mean() - found.mean()),
                "answers_changed": int((exact != found).sum()),
            }
    print(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
