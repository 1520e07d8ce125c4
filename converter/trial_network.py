"""The network that `trtforge doctor` converts: small, of the size of MNIST's, and with every weight drawn."""

from __future__ import annotations

import torch

__all__ = ["make_network"]


def make_network() -> torch.nn.Module:
    """Two convolutions and two linear layers for images `(batch, 1, 28, 28)`; logits `(batch, 10)`; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 5, stride=2),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 16, 5, stride=2),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(16 * 16, 32),
            torch.nn.ReLU(),
            torch.nn.Linear(32, 10),
        )
