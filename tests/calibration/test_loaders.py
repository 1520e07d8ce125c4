"""Every kind of source becomes the same batches, and every wrong one is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trtforge.calibration.loaders import read_batches
from trtforge.runtime.errors import CalibrationError, ConfigError
from trtforge.runtime.specs import DimRange, InputSpec

IMAGE = (InputSpec("x", "float32", ("batch", 3, 4, 4)),)
TEXT = (InputSpec("ids", "int64", ("batch", "seq")), InputSpec("mask", "bool", ("batch", "seq")))
DATA = np.random.default_rng(0).standard_normal((6, 3, 4, 4)).astype(np.float32)
IDS, MASK = np.arange(12).reshape(2, 6), np.ones((2, 6), bool)


class Images(Dataset[Any]):
    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(DATA[index]), index


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.from_numpy(DATA))


class Rows:
    """What has __len__ and __getitem__ alone, as data sets of other libraries do."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": DATA[index], "label": "cat"}


def function() -> Iterator[np.ndarray]:
    yield from (DATA[i : i + 2] for i in (0, 2, 4))


@pytest.mark.parametrize(
    ("source", "sizes"),
    [
        (DataLoader(Images(), batch_size=4), [4, 2]),
        (Images(), [1] * 6),
        (DataLoader(Stream(), batch_size=5), [5, 1]),
        (Rows(), [1, 1]),
        (function, [2, 2, 2]),
        (lambda: DataLoader(Images(), batch_size=3), [3, 3]),
        (function(), [2, 2, 2]),
        ([DATA[:2], torch.from_numpy(DATA[2:])], [2, 4]),
        ([(DATA, np.zeros(6))], [6]),
        ([[torch.from_numpy(DATA), torch.zeros(6)]], [6]),
        ([{"x": DATA, "y": 3}], [6]),
        ([({"x": DATA}, "label")], [6]),
        ([((DATA,), 1)], [6]),
        ([DATA[0]], [1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sources_of_one_input(source: object, sizes: list[int]) -> None:
    found = list(read_batches(source, IMAGE))
    assert [len(batch["x"]) for batch in found] == sizes
    joined = np.concatenate([batch["x"] for batch in found])
    np.testing.assert_array_equal(joined, DATA[: len(joined)])
    assert all(batch["x"].dtype == np.float32 and batch["x"].flags.c_contiguous for batch in found)


@pytest.mark.parametrize(
    "item",
    [
        (IDS, MASK),
        (IDS, MASK, "labels"),
        ((IDS, MASK), "labels"),
        {"mask": MASK, "ids": torch.from_numpy(IDS), "labels": [1, 2]},
        ({"ids": IDS, "mask": MASK}, 7),
        [IDS.tolist(), MASK.tolist()],
    ],
    ids=["tuple", "labels", "nested", "dict", "dict and label", "lists"],
)
def test_several_inputs(item: object) -> None:
    (batch,) = read_batches([item], TEXT)
    np.testing.assert_array_equal(batch["ids"], IDS)
    np.testing.assert_array_equal(batch["mask"], MASK)


def test_bfloat16_tensors() -> None:
    (batch,) = read_batches(
        [torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)], (InputSpec("x", "bfloat16", ("n", 2)),)
    )
    assert batch["x"].dtype == ml_dtypes.bfloat16
    assert batch["x"].astype(np.float32).tolist() == [[1.5, -2.0]]


def test_limit_and_streaming() -> None:
    read: list[int] = []

    def source() -> Iterator[np.ndarray]:
        for index in range(5):
            read.append(index)
            yield DATA[:1]

    assert len(list(read_batches(source, IMAGE, limit=3))) == 3
    assert read == [0, 1, 2]


def test_a_source_is_not_read_ahead_nor_pickled() -> None:
    read: list[int] = []
    source = ((read.append(index), DATA[:1])[1] for index in range(3))
    batches = read_batches(source, IMAGE)
    assert read == []
    next(batches)
    assert read == [0]


def test_an_exception_passes_through_as_it_is() -> None:
    error = KeyError("picture")

    def source() -> Iterator[np.ndarray]:
        yield DATA[:1]
        raise error

    batches = read_batches(source, IMAGE)
    next(batches)
    with pytest.raises(KeyError) as raised:
        next(batches)
    assert raised.value is error


@pytest.mark.parametrize(("source", "why"), [([], "it is empty"), (iter([]), "only once"), (list, "it is empty")])
def test_no_batches(source: object, why: str) -> None:
    with pytest.raises(CalibrationError, match=rf"gave 0 batches(.|\n)*{why}"):
        list(read_batches(source, IMAGE))


def test_an_iterator_at_its_end() -> None:
    source = function()
    assert len(list(read_batches(source, IMAGE))) == 3
    with pytest.raises(CalibrationError, match="a generator gave 0 batches"):
        list(read_batches(source, IMAGE))


@pytest.mark.parametrize("source", ["data.npz", DATA, {"x": DATA}, 3, None, lambda: 5])
def test_what_is_no_source(source: object) -> None:
    with pytest.raises(ConfigError, match="batch"):
        list(read_batches(source, IMAGE))


BAD: dict[str, tuple[Any, str]] = {
    "dtype": (DATA.astype(np.float64), r"batch 1: input 'x' is float64, the model takes float32"),
    "rank": (DATA[0, 0], r"batch 1: input 'x' has shape \[4, 4\], the model takes \['batch', 3, 4, 4\]"),
    "size": (DATA[:, :2], r"batch 1: input 'x' has shape \[6, 2, 4, 4\]"),
    "empty": (DATA[:0], r"batch 1: input 'x' has shape \[0, 3, 4, 4\]: it is empty"),
    "nan": (np.where(DATA > 2, np.nan, DATA).astype(np.float32), r"batch 1: input 'x' has \d+ NaN and 0 infinite"),
    "inf": (np.where(DATA > 2, np.inf, DATA).astype(np.float32), r"batch 1: input 'x' has 0 NaN and \d+ infinite"),
    "key": ({"image": DATA}, r"batch 1: has no 'x'(.|\n)*its keys are 'image'"),
    "text": (["a.png"], r"batch 1: input 'x' is list, not an array of numbers"),
    "ragged": ([[[1.0], [1.0, 2.0]]], r"batch 1: input 'x' is list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_batch_is_named(name: str) -> None:
    item, message = BAD[name]
    with pytest.raises(CalibrationError, match=message):
        list(read_batches([DATA, item], IMAGE))


def test_large_values_are_finite() -> None:
    huge = np.full((1, 3, 4, 4), 3e38, np.float32)
    assert len(list(read_batches([huge], IMAGE))) == 1


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((IDS,), r"has 1 elements, the model has 2 inputs: ids, mask"),
        (IDS, r"is a single ndarray, the model has 2 inputs: ids, mask"),
        ((IDS, MASK[:, :5]), r"dimension 'seq' is 6 in input 'ids' and 5 in 'mask'"),
        ((IDS, IDS), r"input 'mask' is int64, the model takes bool"),
    ],
)
def test_wrong_batches_of_several_inputs(item: object, message: str) -> None:
    with pytest.raises(CalibrationError, match="batch 0: " + message):
        list(read_batches([item], TEXT))


def test_shapes_outside_every_profile() -> None:
    small, large = ({"batch": DimRange(lo, lo, hi)} for lo, hi in ((1, 2), (4, 6)))
    assert len(list(read_batches([DATA[:2], DATA], IMAGE, (small, large)))) == 2
    with pytest.raises(CalibrationError, match=r"batch 1: input 'x' has shape \[3, 3, 4, 4\]: dimension 'batch' is 3"):
        list(read_batches([DATA[:2], DATA[:3]], IMAGE, (small, large)))
