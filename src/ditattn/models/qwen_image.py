"""Qwen-Image: text tokens, then image tokens, in one joint attention; further images (editing) stand behind the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, text_length

__all__ = ["QWEN_IMAGE"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_shapes` is, per sample, a list of (F, Y, X) in tokens, the generated image first.

    Raises:
        ValueError: samples of one batch have different shapes.
    """
    shapes = [_listed(sample) for sample in arguments["img_shapes"]]
    if any(sample != shapes[0] for sample in shapes):
        raise ValueError(f"samples of one batch differ in img_shapes: {shapes}")
    frames, rows, columns = shapes[0][0]
    batch, length, channels = arguments["hidden_states"].shape
    return TokenLayout((batch, channels, frames, rows, columns), (1, 1, 1), text_length(arguments), length - frames * rows * columns)


def _listed(sample: Any) -> list[tuple[int, int, int]]:
    images = sample if isinstance(sample[0], (list, tuple)) else [sample]
    return [(int(f), int(y), int(x)) for f, y, x in images]


QWEN_IMAGE = ModelFamily(
    name="Qwen-Image",
    transformer_classes=("QwenImageTransformer2DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn",
    notes="text before the image, further images after it, all protected",
)
