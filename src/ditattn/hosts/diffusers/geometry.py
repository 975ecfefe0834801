"""Which heights, widths and frame counts a pipeline makes as asked.

diffusers rounds some and refuses others; here that is known beforehand.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from ditattn.errors import ConfigError
from ditattn.models import family_of
from ditattn.models.base import one_more_than_a_multiple, patch_triple

__all__ = ["check_geometry", "default_tokens", "frames_to_ask", "size_multiples"]

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


def default_tokens(pipe: Any) -> tuple[dict[str, int], int | None]:
    """(height, width and frames of a call that asks for none, tokens of such an image or video); ({}, None) if the pipeline does not say.

    Args:
        pipe: a pipeline, or None.
    """
    size = _default_size(pipe)
    if "height" not in size or "width" not in size:
        return {}, None
    rows, columns = (size[key] // pixels for key, pixels in zip(("height", "width"), _pixels_per_token(pipe), strict=True))
    frames = 1
    if "num_frames" in size:
        patch = getattr(_denoiser(pipe).config, "patch_size", 1)
        by_frames = patch_triple(_denoiser(pipe).config)[0] if not isinstance(patch, (list, tuple)) or len(patch) == 3 else 1
        frames = ((size["num_frames"] - 1) // (_first(pipe, _TEMPORAL) or 1) + 1) // by_frames
    return size, frames * rows * columns


def _default_size(pipe: Any) -> dict[str, int]:
    """What the call's signature says, else what most pipelines make of the size of the latents."""
    if pipe is None:
        return {}
    defaults = {name: one.default for name, one in inspect.signature(type(pipe).__call__).parameters.items()}
    size = {name: defaults[name] for name in ("height", "width", "num_frames") if isinstance(defaults.get(name), int)}
    scale = _first(pipe, ("vae_scale_factor", *_SPATIAL))
    config = getattr(_denoiser(pipe), "config", None)
    for name in {"height", "width"} - set(size) if scale is not None else ():
        latents = (
            getattr(pipe, "default_sample_size", None) or getattr(config, f"sample_{name}", None) or getattr(config, "sample_size", None)
        )
        if isinstance(latents, int):
            size[name] = latents * int(scale or 1)
    if "num_frames" in defaults and "num_frames" not in size and isinstance(getattr(config, "sample_frames", None), int):
        size["num_frames"] = config.sample_frames  # type: ignore[union-attr]
    return size


def _pixels_per_token(pipe: Any) -> tuple[int, int]:
    """Height and width of what a token of the image stands for."""
    family = family_of(_denoiser(pipe))
    if family is not None and family.pixels_per_token is not None:
        return family.pixels_per_token, family.pixels_per_token
    spatial = _first(pipe, _SPATIAL)
    patch = getattr(_denoiser(pipe).config, "patch_size", None) or 1
    rows, columns = patch[-2:] if isinstance(patch, (list, tuple)) else (patch, patch)
    scale = spatial or _first(pipe, ("vae_scale_factor",)) or 1
    # pipelines that pack 2x2 latents count it in their processor
    packed = 1 if spatial else int(getattr(getattr(getattr(pipe, "image_processor", None), "config", None), "vae_scale_factor", 1))
    return max(scale * int(rows), packed), max(scale * int(columns), packed)


def _first(pipe: Any, names: tuple[str, ...]) -> int | None:
    return next((int(getattr(pipe, name)) for name in names if getattr(pipe, name, None)), None)


def _denoiser(pipe: Any) -> Any:
    first = getattr(pipe, "transformer", None)
    # a compiled module has no truth value
    return getattr(pipe, "transformer_2", None) if first is None else first
