"""Lumina Image 2: the text without its padding, then image tokens, in one attention; first layers see the image alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import ModelFamily, TokenLayout, image_layout, rising

__all__ = ["LUMINA2"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, H, W)`; the padding that `encoder_attention_mask` hides is cut off, and the image follows the text.

    Raises:
        ValueError: texts of one batch differ in length, so that their images begin at different places.
    """
    return image_layout(config.patch_size, arguments, prefix=_real_tokens(arguments["encoder_attention_mask"]))


# a pipeline passes the same mask in every step: reading it costs a device synchronisation, once per run
_lengths: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _real_tokens(mask: Tensor) -> int:
    if mask not in _lengths:
        _lengths[mask] = {int(count) for count in mask.sum(1).tolist()}
    if len(_lengths[mask]) != 1:
        raise ValueError(f"texts of one batch differ in length: {sorted(_lengths[mask])}")
    return next(iter(_lengths[mask]))


def head_size(config: Any) -> int:
    return int(config.hidden_size) // int(config.num_attention_heads)


LUMINA2 = ModelFamily(
    name="Lumina Image 2",
    transformer_classes=("Lumina2Transformer2DModel",),
    layout=layout,
    time=rising("timestep"),
    self_attention=r"(noise_refiner|layers)\.\d+\.attn",
    image_only=r"noise_refiner\.\d+\.attn",
    head_size=head_size,
    dispatches=False,
    notes="text before the image, protected; the first layers see the image alone; texts of unequal length in a batch run densely",
)
