"""Trains the digits network in a few seconds on a CPU and writes `digits.safetensors` beside this file."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "configs"))

from example_models import digits, digits_data  # noqa: E402  # the configurations' folder is put in the path above


def train(path: Path, epochs: int = 12, seed: int = 0) -> float:
    """Trains on 1,347 images, writes the weights to `path`, and returns the accuracy on the other 450."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # the network is so small that threads cost more than they give
    model = digits()
    images, labels = (torch.from_numpy(a) for a in digits_data("train"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        loss = torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    save_file(model.state_dict(), path)
    model.eval()
    test_images, test_labels = digits_data("test")
    with torch.inference_mode():
        predicted = model(torch.from_numpy(test_images)).argmax(1).numpy()
    return float(np.mean(predicted == test_labels))


if __name__ == "__main__":
    print(f"test accuracy {train(HERE / 'digits.safetensors'):.4f}")
