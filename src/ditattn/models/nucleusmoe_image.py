"""NucleusMoE-Image: queries are the image's alone, keys those of the image and the text, in one attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, text_length

__all__ = ["NUCLEUSMOE_IMAGE"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_shapes` is (F, Y, X) in tokens, or a list of it per sample.

    Raises:
        ValueError: samples of one batch have different shapes.
    """
    shapes = arguments["img_shapes"]
    listed = {tuple(map(int, one)) for one in (shapes if isinstance(shapes, list) else [shapes])}
    if len(listed) != 1:
        raise ValueError(f"samples of one batch differ in img_shapes: {sorted(listed)}")
    frames, rows, columns = next(iter(listed))
    batch, length, channels = arguments["hidden_states"].shape
    behind = length - frames * rows * columns + text_length(arguments)
    return TokenLayout((batch, channels, frames, rows, columns), (1, 1, 1), num_suffix_tokens=behind)


NUCLEUSMOE_IMAGE = ModelFamily(
    name="NucleusMoE-Image",
    transformer_classes=("NucleusMoEImageTransformer2DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn",
    text_is_keys_only=True,
    notes="keys of the text after those of the image, protected; its key-padding mask is honoured by every kernel but `fa`'s",
)
