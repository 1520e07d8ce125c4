"""The golden set: inputs, and what PyTorch computes from them in fp32, recorded once and kept with the artifact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trtforge.runtime.errors import ArtifactError, ConfigError
from trtforge.runtime.inputs import make_inputs, numpy_dtype
from trtforge.runtime.runner import Array, Runner, Tensors
from trtforge.runtime.specs import InputSpec, Profile, TensorSpec, profile_points
from trtforge.runtime.tensors import load_tensors, save_tensors
from trtforge.validation.metrics import is_float

__all__ = [
    "EXTREME",
    "INPUTS_FILE",
    "OUTPUTS_FILE",
    "GoldenSet",
    "Sample",
    "SamplePoint",
    "group_by_sample",
    "load_outputs",
    "plan_points",
    "record",
    "run_samples",
    "sizes_of",
]

EXTREME = "extreme"
"""What the names of extreme samples end with."""
INPUTS_FILE = "inputs.safetensors"
OUTPUTS_FILE = "outputs.safetensors"
BYTE_LIMIT = 256 << 20
SCHEMA = 1
_METADATA = "golden"

_FLOATS = frozenset({"float32", "float16", "bfloat16", "float64"})


@dataclass(frozen=True, slots=True)
class SamplePoint:
    """Where to record a sample.

    Attributes:
        name: Unique, without a slash: "opt", "min", "max", "opt-2", with several profiles "1.opt".
        sizes: The size of every named dimension.
        seed: What `make_inputs` is given.
        required: A profile's point, which is always recorded; False for a repetition with another seed.
        extreme: Floats with `values` go to their ends; see `make_inputs`. Left out where the reference is not finite
            there, since that tells nothing of the candidate.
    """

    name: str
    sizes: Mapping[str, int]
    seed: int
    required: bool = True
    extreme: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One set of inputs and the reference's outputs.

    Attributes:
        name: Unique, without a slash.
        sizes: The size of every named dimension.
        seed: What its inputs were generated with; None for real inputs from the user's loader.
        inputs: Arrays by input name.
        outputs: Arrays by output name.
    """

    name: str
    sizes: Mapping[str, int]
    seed: int | None
    inputs: Tensors = field(repr=False)
    outputs: Tensors = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class GoldenSet:
    """Samples, and which runner recorded their outputs ("torch", "2.14.1")."""

    samples: tuple[Sample, ...]
    runner: str
    version: str

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs and outputs."""
        return sum(_nbytes(sample.inputs) + _nbytes(sample.outputs) for sample in self.samples)

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Writes `inputs.safetensors` and `outputs.safetensors` with keys `<sample>/<tensor>`; equal sets, equal bytes.

        Raises:
            ArtifactError: `folder` cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot make {folder}: {error.strerror or error}") from error
        # Both files carry the same words, so that files of two sets are not taken for one.
        metadata = {_METADATA: json.dumps(self._describe())}
        paths = folder / INPUTS_FILE, folder / OUTPUTS_FILE
        save_tensors(paths[0], _flatten((s.name, s.inputs) for s in self.samples), metadata)
        save_tensors(paths[1], _flatten((s.name, s.outputs) for s in self.samples), metadata)
        return paths

    @classmethod
    def load(cls, folder: Path) -> GoldenSet:
        """Reads what `save` wrote; needs no torch.

        Raises:
            ArtifactError: a file is missing or corrupt, of another schema version, or the two do not belong together.
        """
        fix = "copy the artifact whole, or convert again"
        inputs, metadata = load_tensors(folder / INPUTS_FILE)
        outputs, other = load_tensors(folder / OUTPUTS_FILE)
        if metadata != other:
            raise ArtifactError(
                f"{INPUTS_FILE} and {OUTPUTS_FILE} in {folder} belong to different golden sets", fix=fix
            )
        try:
            data = json.loads(metadata[_METADATA])
            if data["schema"] != SCHEMA:
                raise ArtifactError(
                    f"the golden set in {folder} has schema {data['schema']!r}; this trtforge reads {SCHEMA}",
                    fix="validate it with the trtforge that wrote it, or convert again",
                )
            by_input, by_output = group_by_sample(inputs), group_by_sample(outputs)
            samples = tuple(_read_sample(item, by_input, by_output) for item in data["samples"])
            return cls(samples, str(data["runner"]), str(data["version"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the golden set in {folder} is damaged: {error!r}", fix=fix) from error

    def _describe(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "runner": self.runner,
            "version": self.version,
            "samples": [
                {
                    "name": s.name,
                    "sizes": dict(s.sizes),
                    "seed": s.seed,
                    "inputs": {name: array.dtype.name for name, array in s.inputs.items()},
                    "outputs": {name: array.dtype.name for name, array in s.outputs.items()},
                }
                for s in self.samples
            ],
        }


def plan_points(profiles: Sequence[Profile], *, repeats: int = 2, extremes: bool = False) -> tuple[SamplePoint, ...]:
    """Opt, min and max of every profile, each once and with a seed of its own, then repetitions of the opt points.

    Args:
        profiles: None, or one without dimensions, for a model whose shapes are all fixed.
        repeats: Further samples at each opt point. Several samples of one shape show whether outputs depend on inputs.
        extremes: Also one extreme sample at the max of each profile. Without it faults that rare inputs meet went
            through: of 50 overflows and saturations at a limit that 0.1 to 5 % of a held-out set exceed, digits' proof
            passed 11, with it none (`trtforge audit`, docs/results.md).
    """
    points: list[SamplePoint] = []
    seen: set[tuple[tuple[str, int], ...]] = set()
    opts: list[tuple[str, Mapping[str, int]]] = []
    far: list[tuple[str, Mapping[str, int]]] = []
    for index, profile in enumerate(profiles or [{}]):
        prefix = f"{index}." if len(profiles) > 1 else ""
        ends = profile_points(profile)
        far.append((prefix + EXTREME, ends["max"]))
        for end in ("opt", "min", "max"):
            key = tuple(sorted(ends[end].items()))
            if key in seen:
                continue
            seen.add(key)
            points.append(SamplePoint(prefix + end, ends[end], seed=len(points)))
            if end == "opt":
                opts.append((prefix + end, ends[end]))
    for number in range(2, repeats + 2):
        for name, sizes in opts:
            points.append(SamplePoint(f"{name}-{number}", sizes, seed=len(points), required=False))
    if extremes:
        for name, sizes in far:
            points.append(SamplePoint(name, sizes, seed=len(points), required=False, extreme=True))
    return tuple(points)


def record(
    runner: Runner,
    inputs: Sequence[InputSpec],
    points: Sequence[SamplePoint],
    *,
    real: Iterable[Tensors] = (),
    byte_limit: int = BYTE_LIMIT,
    on_sample: Callable[[str], None] | None = None,
) -> GoldenSet:
    """Runs the reference at every point, then on real inputs, then on repetitions.

    Points are always recorded, and so are the first real inputs. Further real inputs and repetitions are left out once
    the set holds `byte_limit` bytes, save that there are always two samples: one alone cannot show that the output
    depends on the input.

    Args:
        runner: The reference: PyTorch in fp32.
        inputs: The model's inputs, with the values that may be generated.
        points: From `plan_points`.
        real: Inputs from the user's loader, named and typed as `inputs`.
        byte_limit: Bytes of inputs and outputs.
        on_sample: Called with each sample's name before it runs.

    Raises:
        ConfigError: real inputs that do not fit `inputs`.
    """
    samples: list[Sample] = []
    size = 0

    def add(name: str, sizes: Mapping[str, int], seed: int | None, feeds: Tensors) -> None:
        nonlocal size
        if on_sample is not None:
            on_sample(name)
        sample = Sample(name, dict(sizes), seed, feeds, runner.run(feeds))
        size += _nbytes(sample.inputs) + _nbytes(sample.outputs)
        samples.append(sample)

    for point in points:
        if point.required:
            add(point.name, point.sizes, point.seed, make_inputs(inputs, point.sizes, point.seed))
    for number, feeds in enumerate(real, 1):
        if number > 1 and size >= byte_limit:
            break
        add(f"real-{number}", sizes_of(inputs, feeds, name=f"real sample {number}"), None, dict(feeds))
    for point in points:
        if not point.required and (size < byte_limit or len(samples) < 2):
            feeds = make_inputs(inputs, point.sizes, point.seed, extreme=point.extreme)
            add(point.name, point.sizes, point.seed, feeds)
            if point.extreme and not _is_finite(samples[-1].outputs):
                samples.pop()
    return GoldenSet(tuple(samples), runner.name, runner.version)


def sizes_of(inputs: Sequence[TensorSpec], feeds: Tensors, *, name: str = "sample") -> dict[str, int]:
    """The size of every named dimension in one set of inputs.

    Raises:
        ConfigError: an input is missing or unknown, or has another dtype, rank or size; one dimension with two sizes.
    """
    if set(feeds) != {spec.name for spec in inputs}:
        raise ConfigError(
            f"{name} has the inputs {', '.join(sorted(feeds)) or 'none'}",
            fix=f"give exactly {', '.join(spec.name for spec in inputs)}",
        )
    sizes: dict[str, int] = {}
    for spec in inputs:
        array = feeds[spec.name]
        if array.dtype.name != spec.dtype:
            raise ConfigError(f"{name}: input {spec.name!r} is {array.dtype.name}, the model takes {spec.dtype}")
        fits = len(array.shape) == len(spec.shape) and all(
            size == (dim if isinstance(dim, int) else sizes.setdefault(dim, size))
            for dim, size in zip(spec.shape, array.shape, strict=True)
        )
        if not fits:
            raise ConfigError(
                f"{name}: input {spec.name!r} has shape {list(array.shape)}, the model takes {list(spec.shape)}",
                why=f"with {', '.join(f'{dim} = {size}' for dim, size in sizes.items())}" if sizes else "",
            )
        for dim, value in zip(
            spec.elements if isinstance(spec, InputSpec) else (), array.reshape(-1).tolist(), strict=False
        ):
            if value != (dim if isinstance(dim, int) else sizes.setdefault(dim, value)):
                raise ConfigError(
                    f"{name}: input {spec.name!r} says {value} where {dim!r} is {sizes.get(str(dim), dim)}",
                    fix="give inputs whose values agree with the shapes that they name",
                )
    return sizes


def run_samples(
    golden: GoldenSet, runner: Runner, *, on_sample: Callable[[str], None] | None = None
) -> dict[str, dict[str, Array]]:
    """The outputs of `runner` for every sample, by sample and output name.

    Floating inputs are cast where the runner takes another floating type (a plan with `keep_io: false`).
    """
    kinds = {spec.name: spec.dtype for spec in runner.inputs}
    outputs: dict[str, dict[str, Array]] = {}
    for sample in golden.samples:
        if on_sample is not None:
            on_sample(sample.name)
        outputs[sample.name] = runner.run(
            {name: _cast(array, kinds.get(name)) for name, array in sample.inputs.items()}
        )
    return outputs


def load_outputs(path: Path) -> dict[str, dict[str, Array]]:
    """Outputs by sample and output name, from a file with keys `<sample>/<output>` as the children write it.

    Raises:
        ArtifactError: the file is missing or corrupt, or its keys are others.
    """
    tensors, _ = load_tensors(path)
    try:
        return group_by_sample(tensors)
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}", fix="run the candidate again") from error


def group_by_sample(tensors: Tensors) -> dict[str, dict[str, Array]]:
    """Arrays with keys `<sample>/<tensor>`, by sample and tensor name.

    Raises:
        ValueError: a key without a slash.
    """
    out: dict[str, dict[str, Array]] = {}
    for key, array in tensors.items():
        # Tensor names of ONNX may hold slashes, names of samples never do.
        sample, slash, name = key.partition("/")
        if not slash:
            raise ValueError(f"tensor {key!r} is not named <sample>/<tensor>")
        out.setdefault(sample, {})[name] = array
    return out


def _cast(array: Array, dtype: str | None) -> Array:
    if dtype is None or array.dtype.name == dtype or not {array.dtype.name, dtype} <= _FLOATS:
        return array
    return array.astype(numpy_dtype(dtype))


def _flatten(samples: Iterable[tuple[str, Tensors]]) -> dict[str, Array]:
    return dict(_keys(samples))


def _keys(samples: Iterable[tuple[str, Tensors]]) -> Iterator[tuple[str, Array]]:
    for sample, tensors in samples:
        for name, array in tensors.items():
            yield f"{sample}/{name}", array


def _read_sample(data: Mapping[str, Any], inputs: Mapping[str, Tensors], outputs: Mapping[str, Tensors]) -> Sample:
    name = data["name"]
    sides = []
    for side, stored in (("inputs", inputs), ("outputs", outputs)):
        # A sample without tensors has no key in the file; order is the recorded one, not the file's.
        arrays = {tensor: stored[name][tensor] for tensor in data[side]}
        for tensor, dtype in data[side].items():
            if arrays[tensor].dtype.name != dtype:
                raise ValueError(f"{name}/{tensor} is {arrays[tensor].dtype.name}, was recorded as {dtype}")
        sides.append(arrays)
    return Sample(name, {k: int(v) for k, v in data["sizes"].items()}, data["seed"], sides[0], sides[1])


def _is_finite(tensors: Tensors) -> bool:
    return all(bool(np.isfinite(array.astype(np.float32)).all()) for array in tensors.values() if is_float(array))


def _nbytes(tensors: Tensors) -> int:
    return sum(array.nbytes for array in tensors.values())
