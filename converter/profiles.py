"""The shapes of optimization profiles, from inputs' shapes and the ranges of their dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtforge.runtime.specs import InputSpec, Profile, resolve_shape

if TYPE_CHECKING:
    from trtforge.runtime.trt.build import Shapes

__all__ = ["engine_profiles"]


def engine_profiles(specs: tuple[InputSpec, ...], profiles: tuple[Profile, ...]) -> tuple[dict[str, Shapes], ...]:
    """Min, opt and max shape of each input in each profile; none where every shape is fixed."""
    dynamic = [spec for spec in specs if any(isinstance(dim, str) for dim in spec.shape)]
    if not dynamic:
        return ()
    return tuple({spec.name: _shapes(spec, profile) for spec in dynamic} for profile in profiles)


def _shapes(spec: InputSpec, profile: Profile) -> Shapes:
    lows = resolve_shape(spec.shape, {name: dim.min for name, dim in profile.items()})
    opts = resolve_shape(spec.shape, {name: dim.opt for name, dim in profile.items()})
    highs = resolve_shape(spec.shape, {name: dim.max for name, dim in profile.items()})
    return lows, opts, highs
