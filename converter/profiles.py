"""The shapes of optimization profiles, from inputs' shapes and the ranges of their dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trtforge.runtime.specs import InputSpec, Profile, resolve_shape

if TYPE_CHECKING:
    from trtforge.runtime.trt.build import Shapes

__all__ = ["engine_profiles", "engine_values"]


def engine_profiles(specs: tuple[InputSpec, ...], profiles: tuple[Profile, ...]) -> tuple[dict[str, Shapes], ...]:
    """Min, opt and max shape of each input in each profile; no profile where nothing is dynamic."""
    if not any(spec.dims for spec in specs):
        return ()
    dynamic = [spec for spec in specs if any(isinstance(dim, str) for dim in spec.shape)]
    return tuple({spec.name: _ends(spec.shape, profile) for spec in dynamic} for profile in profiles)


def engine_values(specs: tuple[InputSpec, ...], profiles: tuple[Profile, ...]) -> tuple[dict[str, Shapes], ...]:
    """Min, opt and max values of each input whose values decide shapes, in each profile; empty without such inputs."""
    deciding = [spec for spec in specs if spec.elements]
    if not deciding:
        return ()
    return tuple({spec.name: _ends(spec.elements, profile) for spec in deciding} for profile in profiles or ({},))


def _ends(dims: Sequence[int | str], profile: Profile) -> Shapes:
    lows = resolve_shape(dims, {name: dim.min for name, dim in profile.items()})
    opts = resolve_shape(dims, {name: dim.opt for name, dim in profile.items()})
    highs = resolve_shape(dims, {name: dim.max for name, dim in profile.items()})
    return lows, opts, highs
