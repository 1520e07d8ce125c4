"""Makes what test_carried.py takes to a GPU, on a machine without one: `python tests/gpu/make_carried.py FOLDER`.

`FOLDER/portable` is made for the full TensorRT, which is not here; `FOLDER/built` by the TensorRT-RTX that this Python
finds. For another release of it: `pip install --target SITE tensorrt-rtx==1.6.1.120`, and SITE in PYTHONPATH.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import trtforge

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "examples/digits/digits.safetensors"


def make_artifacts(folder: Path) -> None:
    """Converts the digits' CNN in fp16 for each of the two."""
    from safetensors.torch import load_file

    sys.path.insert(0, str(ROOT / "configs"))
    from example_models import digits

    model = digits()
    model.load_state_dict(load_file(WEIGHTS))
    for name, backend in (("portable", "tensorrt"), ("built", "tensorrt-rtx")):
        artifact = trtforge.convert(
            model.eval(),
            torch.rand(32, 1, 8, 8),
            folder / name,
            precision="fp16",
            dims={"batch": (1, 32, 256)},
            inputs={"image": ("batch", 1, 8, 8)},
            outputs=["logits"],
            backend=backend,
        )
        assert artifact.status == name, artifact.status
        engine = artifact.facts["engine"]
        print(f"{artifact.path}: {artifact.status}", engine and f"by {engine['backend']} {engine['version']}")


if __name__ == "__main__":
    if not WEIGHTS.exists():
        subprocess.run([sys.executable, str(ROOT / "examples/digits/train.py")], check=True)
    make_artifacts(Path(sys.argv[1]))
