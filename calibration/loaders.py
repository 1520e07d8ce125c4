"""Whatever gives data becomes one thing: an iterator of named numpy batches, each checked against the model's inputs.

A source is streamed: nothing is pickled, kept, or read ahead. What its own code raises passes through as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from trtforge.runtime.errors import CalibrationError, ConfigError
from trtforge.runtime.inputs import numpy_dtype
from trtforge.runtime.runner import Array
from trtforge.runtime.specs import InputSpec, Profile
from trtforge.runtime.suggest import nearest

__all__ = ["iterate_source", "read_batches"]


def read_batches(
    source: object, specs: Sequence[InputSpec], profiles: Sequence[Profile] = (), limit: int | None = None
) -> Iterator[dict[str, Array]]:
    """The batches of a source, by input name.

    A batch is a tensor or array (for models of one input), a tuple or list in the order of the inputs, or a mapping by
    their names. What lies beyond the inputs, labels as a rule, is left out: the `y` of `(x, y)`, a third element for a
    model of two inputs, keys that are no input. The first element of `((a, b), y)` or `({...}, y)` is the batch. Where
    an array has one dimension less than its input, it is a single sample, and gets a batch dimension of 1.

    Args:
        source: A DataLoader, Dataset or other sequence or iterable of batches or samples; or a function without
            parameters that gives one.
        specs: The model's inputs.
        profiles: The shapes allowed; () allows all that `specs` does.
        limit: Stop after so many batches; None reads to the end.

    Yields:
        C-contiguous arrays of the specs' dtypes.

    Raises:
        ConfigError: `source` can give no batches at all.
        CalibrationError: it gave none, or a batch that is not the model's (input and batch are named): an input is
            missing, has another dtype or shape, a shape outside every profile, or values that are NaN or infinite.
    """
    count = 0
    for count, item in enumerate(iterate_source(source), 1):
        yield _Batch(count - 1, specs, profiles).read(item)
        if count == limit:
            return
    if count == 0:
        raise CalibrationError(
            f"{_describe(source)} gave 0 batches",
            why="an iterator can be read only once, and this one is at its end"
            if isinstance(source, Iterator)
            else "it is empty",
            fix="give a list, a DataLoader, or a function that makes a new iterator on each call",
        )


def iterate_source(source: object) -> Iterable[object]:
    """The batches of a source as they come; what a source may be says `read_batches`, which raises the same."""
    if isinstance(source, (str, bytes, Mapping)) or _is_array(source):
        raise ConfigError(
            f"{_describe(source)} is one batch or a name, not a source of batches",
            fix="put it into a list, or give a DataLoader, a Dataset, or a function that gives batches",
        )
    if _is_map_style(source):  # its __iter__, where there is one at all, is Python's old protocol and may never end
        indexed = cast("Any", source)
        return (indexed[index] for index in range(len(indexed)))
    if isinstance(source, Iterable):
        return source
    if callable(source):
        made = cast("Callable[[], object]", source)()
        if not callable(made):
            return iterate_source(made)
    raise ConfigError(
        f"{_describe(source)} gives no batches",
        fix="give a DataLoader, a Dataset with __len__ and __getitem__, an iterable, or a function that returns one",
    )


def _is_map_style(source: object) -> bool:
    if not (hasattr(source, "__getitem__") and hasattr(source, "__len__")):
        return False
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.utils.data.Dataset):
        return True
    return not hasattr(source, "__iter__")


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray) or (hasattr(value, "detach") and hasattr(value, "numpy"))


def _describe(source: object) -> str:
    kind = type(source)
    if kind.__name__ == "function" or kind.__name__ == "method":
        return f"the function {getattr(source, '__qualname__', '?')}"
    return f"a {kind.__name__}"


class _Batch:
    """Reads one batch; holds what its errors name."""

    def __init__(self, index: int, specs: Sequence[InputSpec], profiles: Sequence[Profile]) -> None:
        self.index, self.specs, self.profiles = index, specs, profiles
        self.sizes: dict[str, tuple[str, int]] = {}

    def read(self, item: object) -> dict[str, Array]:
        given = self._by_name(item)
        batch = {spec.name: self._array(spec, given[spec.name]) for spec in self.specs}
        self._check_profiles(batch)
        return batch

    def _by_name(self, item: object) -> Mapping[str, object]:
        if isinstance(item, (tuple, list)) and item and isinstance(item[0], (tuple, list, Mapping)) and item[0]:
            first = item[0]
            # A list of plain numbers is an array that was not converted, not a tuple of inputs.
            if isinstance(first, Mapping) or any(_is_array(value) for value in first):
                item = first
        if isinstance(item, Mapping):
            for spec in self.specs:
                if spec.name not in item:
                    raise self._wrong(
                        f"has no {spec.name!r}",
                        why=f"its keys are {', '.join(map(repr, item))}",
                        fix=nearest(spec.name, map(str, item)) + "; keys are the model's input names",
                    )
            return item
        if isinstance(item, (tuple, list)) and not (len(self.specs) == 1 and item and np.isscalar(item[0])):
            if len(item) < len(self.specs):
                names = ", ".join(spec.name for spec in self.specs)
                raise self._wrong(f"has {len(item)} elements, the model has {len(self.specs)} inputs: {names}")
            return {spec.name: value for spec, value in zip(self.specs, item, strict=False)}
        if len(self.specs) != 1:
            names = ", ".join(spec.name for spec in self.specs)
            raise self._wrong(
                f"is a single {type(item).__name__}, the model has {len(self.specs)} inputs: {names}",
                fix="give a tuple in that order, or a dict by those names",
            )
        return {self.specs[0].name: item}

    def _array(self, spec: InputSpec, value: object) -> Array:
        array = self._to_numpy(spec, value)
        wanted = numpy_dtype(spec.dtype)
        if array.dtype != wanted:
            raise self._wrong(
                f"input {spec.name!r} is {array.dtype.name}, the model takes {spec.dtype}",
                fix=f"convert it in the loader, with .astype({spec.dtype!r}) or .to(torch.{spec.dtype})",
            )
        if array.ndim == len(spec.shape) - 1:
            array = array[None]
        self._check_shape(spec, array)
        array = np.ascontiguousarray(array)
        _check_finite(self, spec, array)
        return array

    def _to_numpy(self, spec: InputSpec, value: object) -> Array:
        if isinstance(value, np.ndarray):
            return value
        if _is_array(value):
            tensor = cast("Any", value).detach().cpu()
            if str(tensor.dtype) == "torch.bfloat16":  # torch gives numpy no bfloat16
                import torch

                bits: NDArray[np.int16] = tensor.contiguous().view(torch.int16).numpy()
                return bits.view(numpy_dtype("bfloat16"))
            return cast("Array", tensor.numpy())
        try:
            array = np.asarray(value)
        except (TypeError, ValueError) as error:
            raise self._wrong(f"input {spec.name!r} is {type(value).__name__}: {error}") from error
        if array.dtype.kind not in "fiub":
            raise self._wrong(
                f"input {spec.name!r} is {type(value).__name__}, not an array of numbers",
                fix="give tensors or numpy arrays; images need their preprocessing, in the loader",
            )
        return array

    def _check_shape(self, spec: InputSpec, array: Array) -> None:
        wrong = len(array.shape) != len(spec.shape) or any(
            isinstance(dim, int) and dim != size for dim, size in zip(spec.shape, array.shape, strict=True)
        )
        if wrong:
            raise self._wrong(f"input {spec.name!r} has shape {list(array.shape)}, the model takes {list(spec.shape)}")
        if 0 in array.shape:
            raise self._wrong(f"input {spec.name!r} has shape {list(array.shape)}: it is empty")
        for dim, size in zip(spec.shape, array.shape, strict=True):
            if isinstance(dim, str):
                other, known = self.sizes.setdefault(dim, (spec.name, size))
                if known != size:
                    raise self._wrong(f"dimension {dim!r} is {known} in input {other!r} and {size} in {spec.name!r}")

    def _check_profiles(self, batch: Mapping[str, Array]) -> None:
        misfits = [self._misfit(profile) for profile in self.profiles]
        if not misfits or None in misfits:
            return
        dim, allowed = cast("tuple[str, str]", misfits[0])
        name, size = self.sizes[dim]
        raise self._wrong(
            f"input {name!r} has shape {list(batch[name].shape)}: dimension {dim!r} is {size}, outside {allowed}",
            why=f"it fits none of the {len(misfits)} optimization profiles" if len(misfits) > 1 else "",
            fix=f"change the loader (its batch size, where {dim!r} is the batch), or widen the dimension in `dims`",
        )

    def _misfit(self, profile: Profile) -> tuple[str, str] | None:
        for dim, (_, size) in self.sizes.items():
            allowed = profile.get(dim)
            if allowed is not None and not allowed.min <= size <= allowed.max:
                return dim, f"[{allowed.min}, {allowed.max}]"
        return None

    def _wrong(self, what: str, *, why: str = "", fix: str = "") -> CalibrationError:
        return CalibrationError(f"batch {self.index}: {what}", why=why, fix=fix)


def _check_finite(batch: _Batch, spec: InputSpec, array: Array) -> None:
    if array.dtype.kind in "iub":
        return
    with np.errstate(over="ignore", invalid="ignore"):
        # A sum is NaN or infinite where an element is; it is several times faster than looking at each of them, and
        # where it has merely overflowed the elements decide.
        if np.isfinite(array.sum(dtype=np.float64 if array.dtype == np.float64 else np.float32)):
            return
    values = array.astype(np.float64)
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    if nan or infinite:
        raise batch._wrong(
            f"input {spec.name!r} has {nan} NaN and {infinite} infinite values among {array.size}",
            fix="look at what the loader reads and how it normalizes: a division by a standard deviation of 0?",
        )
