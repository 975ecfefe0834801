"""Z-Image: image tokens, then text tokens, in one attention, each padded to a multiple of 32; first layers see the image alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, rising

__all__ = ["Z_IMAGE"]

# what the model pads each part of its sequence to
MULTIPLE = 32


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`x` is a list of images `(C, T, H, W)`, one per sample, `cap_feats` a list of texts `(S, D)`.

    Raises:
        ValueError: samples of one batch differ in size. Lists of lists, which the Omni pipelines pass (AttributeError), are not known here.
    """
    shapes = {tuple(image.shape) for image in arguments["x"]}
    if len(shapes) != 1:
        raise ValueError(f"samples of one batch differ in size: {sorted(shapes)}")
    channels, *sizes = next(iter(shapes))
    p, f = int(arguments.get("patch_size", 2)), int(arguments.get("f_patch_size", 1))
    frames, rows, columns = sizes
    padding = -(frames // f * (rows // p) * (columns // p)) % MULTIPLE
    text = max(_padded(len(one)) for one in arguments["cap_feats"])
    shape = (len(arguments["x"]), channels, frames, rows, columns)
    return TokenLayout(shape, (f, p, p), num_suffix_tokens=padding + text, num_image_suffix_tokens=padding)


def _padded(length: int) -> int:
    return length + -length % MULTIPLE


def head_size(config: Any) -> int:
    return int(config.dim) // int(config.n_heads)


Z_IMAGE = ModelFamily(
    name="Z-Image",
    transformer_classes=("ZImageTransformer2DModel",),
    layout=layout,
    time=rising("t"),
    self_attention=r"(noise_refiner|layers)\.\d+\.attention",
    image_only=r"noise_refiner\.\d+\.attention",
    head_size=head_size,
    notes="text after the image, protected; the first layers see the image alone; the Omni pipelines run densely",
)
