"""Qwen-Image 2.1: the first step caches keys of text and given images; then queries are the image's alone, keys those of all tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import ModelFamily, TokenLayout

__all__ = ["QWEN_IMAGE21"]

# a place of the text encoder's sequence that holds an image stands for so many tokens of it
TOKENS_PER_PLACE = 4


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`img_shapes` is, per sample, a list of (F, Y, X) in tokens, the image itself last; `img_mask` `(B, T)` marks the places of images.

    Raises:
        ValueError: samples of one batch have different shapes.
    """
    shapes = [[tuple(map(int, one)) for one in sample] for sample in arguments["img_shapes"]]
    if any(sample != shapes[0] for sample in shapes):
        raise ValueError(f"samples of one batch differ in img_shapes: {shapes}")
    frames, rows, columns = shapes[0][-1]
    batch, _, channels = arguments["hidden_states"].shape
    before = _num_tokens(arguments["img_mask"]) - math.prod(shapes[0][-1])
    return TokenLayout((batch, channels, frames, rows, columns), (1, 1, 1), num_prefix_tokens=before)


# a pipeline passes the same mask in every step: reading it costs a device synchronisation, once per run
_lengths: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _num_tokens(places: Tensor) -> int:
    if places not in _lengths:
        images = int(places[0].sum())
        _lengths[places] = TOKENS_PER_PLACE * images + places.shape[1] - images
    found: int = _lengths[places]
    return found


QWEN_IMAGE21 = ModelFamily(
    name="Qwen-Image 2.1",
    transformer_classes=("QwenImage21Transformer2DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn",
    text_is_keys_only=True,
    notes="cached keys of text and given images before the image, protected; the first step, which fills the cache, is diffusers' own",
)
