"""`make demo`: trains a small CNN, converts it in fp32, fp16 and bf16, and shows what each engine costs and gives."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "configs")]

from example_models import digits_data  # noqa: E402  # the folders are put in the path above
from train import train  # noqa: E402  # likewise

from trtforge.converter.artifact import Artifact, open_artifact  # noqa: E402  # likewise
from trtforge.converter.commands import convert  # noqa: E402  # likewise
from trtforge.converter.terminal import print_table  # noqa: E402  # likewise


def accuracy(artifact: Artifact) -> tuple[float, str]:
    """Share of the 450 test images that the artifact labels right, and what ran it."""
    images, labels = digits_data("test")
    if artifact.status == "validated":
        from trtforge.runtime.trt.execute import EngineRunner

        assert artifact.engine is not None
        facts = artifact.facts["engine"]
        runner = EngineRunner(artifact.engine, facts["backend"], tf32=facts["tf32"])
        logits = np.concatenate([runner.run({"image": images[i : i + 150]})["logits"] for i in range(0, 450, 150)])
        return float(np.mean(logits.argmax(1) == labels)), "engine"
    from trtforge.runtime.graph import load_graph, save_graph
    from trtforge.runtime.onnx_runner import OnnxRuntimeRunner
    from trtforge.validation.emulate import emulate

    with tempfile.TemporaryDirectory() as folder:
        path, how = artifact.model, "onnxruntime"
        if "bf16" in artifact.facts["used_precisions"]:  # onnxruntime has no bf16 kernels on a CPU
            path = save_graph(emulate(load_graph(artifact.model)), Path(folder) / "emulated.onnx").path
            how = "emulated"
        logits = OnnxRuntimeRunner(path).run({"image": images})["logits"]
    return float(np.mean(logits.argmax(1) == labels)), how


def main() -> int:
    """Runs the demo; the exit code is that of `trtforge convert`."""
    output = ROOT / "artifacts"
    print(f"training on scikit-learn's digits … test accuracy in PyTorch {train(HERE / 'digits.safetensors'):.2%}")
    code = convert(ROOT / "configs" / "digits.yaml", only=None, output=output, jobs=1, force=True, as_json=False)
    if code:
        return code
    rows = []
    for precision in ("fp32", "fp16", "bf16"):
        artifact = open_artifact(output / f"digits-{precision}")
        right, how = accuracy(artifact)
        engine = artifact.engine
        assert engine is not None
        measured = artifact.facts["measured"]
        size = f"{engine.stat().st_size / 1e3:.0f}"
        rows.append([precision, artifact.status, size, f"{measured['sqnr_db']:.1f}", f"{measured['max_abs']:.1e}",
                     f"{right:.2%}", how])  # fmt: skip
    columns = ("precision", "status", "engine kB", "SQNR dB", "max abs error", "test accuracy", "measured with")
    print_table("digits: each engine against PyTorch", columns, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
