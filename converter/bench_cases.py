"""Which sizes are measured: asked for, or those that the profiles were made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.specs import InputSpec, Profile, profile_points
from trtforge.runtime.suggest import nearest

__all__ = ["Case", "batch_dim", "choose_cases"]


@dataclass(frozen=True, slots=True)
class Case:
    """One size of every dynamic dimension.

    Attributes:
        sizes: By dimension.
        batch: Items in one call: the size of the first input's first axis; 1 where it has none.
        label: What tables show.
    """

    sizes: Mapping[str, int]
    batch: int
    label: str


def batch_dim(inputs: Sequence[InputSpec]) -> str | None:
    """The dynamic dimension that the first axis of the first input has; None where that is fixed."""
    first = inputs[0].shape[0] if inputs and inputs[0].shape else None
    return first if isinstance(first, str) else None


def choose_cases(
    inputs: Sequence[InputSpec], profiles: Sequence[Profile], batches: Sequence[int] = (), shapes: Sequence[str] = ()
) -> tuple[Case, ...]:
    """The cases to measure: each of `shapes` at each of `batches`.

    Args:
        inputs: The artifact's.
        profiles: Its optimization profiles.
        batches: Batch sizes; empty: what the shapes or the profiles say.
        shapes: Sizes as "seq=128,height=224"; what one leaves out is as the first profile's opt. Empty: every
            profile's min, opt and max.

    Raises:
        ConfigError: a text that is not of that form, an unknown dimension, a batch size where the batch is fixed, or
            sizes that no profile holds.
    """
    opt = profile_points(profiles[0])["opt"]
    if shapes:
        found = [{**opt, **_parse(text, opt)} for text in shapes]
    elif batches:
        found = [opt]
    else:
        found = [point for profile in profiles for point in profile_points(profile).values()]
    if batches:
        dim = batch_dim(inputs)
        if dim is None:
            raise ConfigError(
                f"batch sizes {', '.join(map(str, batches))} were asked for, and the engine's batch is fixed",
                fix="leave --batch out, or convert with a dynamic batch in `dims`",
            )
        found = [{**sizes, dim: batch} for sizes in found for batch in batches]
    unique = [dict(pairs) for pairs in dict.fromkeys(tuple(sorted(sizes.items())) for sizes in found)]
    for sizes in unique:
        if not any(all(p[name].min <= size <= p[name].max for name, size in sizes.items()) for p in profiles):
            ranges = " or ".join(", ".join(f"{n} {d.min}..{d.max}" for n, d in p.items()) for p in profiles)
            raise ConfigError(f"no profile holds {_label(sizes)}", fix=f"the engine takes {ranges}")
    return tuple(Case(sizes, _batch(inputs, sizes), _label(sizes)) for sizes in unique)


def _parse(text: str, known: Mapping[str, int]) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        if not equals or not number.strip().isdecimal():
            raise ConfigError(f"the shape {text!r} is not NAME=SIZE,…", fix="as in --shapes batch=8,seq=128")
        if name.strip() not in known:
            raise ConfigError(f"the engine has no dynamic dimension {name.strip()!r}", fix=nearest(name.strip(), known))
        sizes[name.strip()] = int(number)
    return sizes


def _batch(inputs: Sequence[InputSpec], sizes: Mapping[str, int]) -> int:
    first = inputs[0].shape[0] if inputs and inputs[0].shape else 1
    return sizes[first] if isinstance(first, str) else first


def _label(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "fixed"
