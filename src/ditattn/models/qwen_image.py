"""Qwen-Image: text tokens, then image tokens, in one joint attention; references and layers are images behind the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, prefix_and_rest, text_length
from ditattn.plan.token_grids import TokenGrid

__all__ = ["QWEN_IMAGE"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_shapes` is, per sample, a list of (F, Y, X) in tokens, the generated image first.

    Raises:
        ValueError: samples of one batch have different shapes, or there are fewer tokens than the shapes say.
    """
    shapes = [_listed(sample) for sample in arguments["img_shapes"]]
    if any(sample != shapes[0] for sample in shapes):
        raise ValueError(f"samples of one batch differ in img_shapes: {shapes}")
    batch, length, channels = arguments["hidden_states"].shape
    grids, start = [], text_length(arguments)
    for size in shapes[0]:
        grids.append(TokenGrid(start, size))
        start = grids[-1].stop
    return TokenLayout.of_grids(batch, channels, grids, text_length(arguments) + length)


def _listed(sample: Any) -> list[tuple[int, int, int]]:
    images = sample if isinstance(sample[0], (list, tuple)) else [sample]
    return [(int(f), int(y), int(x)) for f, y, x in images]


QWEN_IMAGE = ModelFamily(
    name="Qwen-Image",
    transformer_classes=("QwenImageTransformer2DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn",
    streams=prefix_and_rest,
    notes="text before the image, protected; every reference or layer has blocks of its own",
)
