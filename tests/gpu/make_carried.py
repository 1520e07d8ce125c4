"""Makes what test_carried.py takes to a GPU, on a machine without one: `python tests/gpu/make_carried.py FOLDER`.

`FOLDER/portable` is made for the full TensorRT, which is not here; `FOLDER/built-fp32`, `-fp16` and `-bf16` by the
TensorRT-RTX that this Python finds. For another release of it: `pip install --target SITE tensorrt-rtx==VERSION`, and
SITE in PYTHONPATH.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import trtforge

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "examples/digits/digits.safetensors"
ARTIFACTS = [
    ("portable", "tensorrt", "fp16"),
    *((f"built-{kind}", "tensorrt-rtx", kind) for kind in ("fp32", "fp16", "bf16")),
]


def make_artifacts(folder: Path) -> None:
    """Converts the digits' CNN for each of them."""
    from safetensors.torch import load_file

    sys.path.insert(0, str(ROOT / "configs"))
    from example_models import digits

    model = digits()
    model.load_state_dict(load_file(WEIGHTS))
    for name, backend, precision in ARTIFACTS:
        artifact = trtforge.convert(
            model.eval(),
            torch.rand(32, 1, 8, 8),
            folder / name,
            precision=precision,
            dims={"batch": (1, 32, 256)},
            inputs={"image": ("batch", 1, 8, 8)},
            outputs=["logits"],
            backend=backend,
        )
        assert artifact.status == name.partition("-")[0], artifact.status
        engine = artifact.facts["engine"]
        print(f"{artifact.path}: {artifact.status}", engine and f"by {engine['backend']} {engine['version']}")


if __name__ == "__main__":
    if not WEIGHTS.exists():
        subprocess.run([sys.executable, str(ROOT / "examples/digits/train.py")], check=True)
    make_artifacts(Path(sys.argv[1]))
