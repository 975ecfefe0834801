"""Which heights, widths and frame counts a pipeline makes as asked.

diffusers rounds some and refuses others; here that is known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ditattn.errors import ConfigError
from ditattn.models import family_of
from ditattn.models.base import one_more_than_a_multiple, patch_triple

__all__ = ["check_geometry", "frames_to_ask", "size_multiples"]

_SPATIAL = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")


def size_multiples(pipe: Any) -> tuple[int, int]:
    """Height and width must be multiples of these. (1, 1) if the pipeline does not say."""
    scale, transformer = _first(pipe, _SPATIAL), _denoiser(pipe)
    family = family_of(transformer)
    least = 1 if family is None else family.size_multiple
    if scale is None:
        # image pipelines that pack 2x2 latents count it in their processor
        processor = getattr(pipe, "image_processor", None)
        scale = math.lcm(int(getattr(getattr(processor, "config", None), "vae_scale_factor", 1)), least)
        return scale, scale
    if getattr(getattr(transformer, "config", None), "patch_size", None) is None:
        return scale, scale
    _, rows, columns = patch_triple(transformer.config)
    return math.lcm(scale * rows, least), math.lcm(scale * columns, least)


def frames_to_ask(pipe: Any, num_frames: int) -> int:
    """What to pass as `num_frames` so that the pipeline makes exactly that many.

    Raises:
        ConfigError: it cannot; says which counts are near.
    """
    factor = _first(pipe, _TEMPORAL)
    if factor is None:
        return num_frames
    family = family_of(_denoiser(pipe))
    return one_more_than_a_multiple(num_frames, factor) if family is None else family.frames_to_ask(num_frames, factor)


def check_geometry(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError if the asked height or width is one that the pipeline would round or refuse."""
    for key, multiple in zip(("height", "width"), size_multiples(pipe), strict=True):
        asked = arguments.get(key)
        if asked is not None and asked % multiple:
            below = asked // multiple * multiple
            nearest = f"{below} or {below + multiple}" if below else str(multiple)
            raise ConfigError(f"{key} must be a multiple of {multiple}, not {asked}; nearest: {nearest}")


def _first(pipe: Any, names: tuple[str, ...]) -> int | None:
    return next((int(getattr(pipe, name)) for name in names if getattr(pipe, name, None)), None)


def _denoiser(pipe: Any) -> Any:
    first = getattr(pipe, "transformer", None)
    # a compiled module has no truth value
    return getattr(pipe, "transformer_2", None) if first is None else first
