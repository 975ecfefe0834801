"""HiDream: image tokens, padding up to the largest image, then text tokens, in one joint attention that calls torch's SDPA directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, image_layout

__all__ = ["HIDREAM_IMAGE"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, H, W)`. Images that are not square are padded; the padding takes part in the attention.

    Raises:
        ValueError: packed `hidden_states`, with which sizes come that only the device knows.
    """
    rows, columns = arguments["hidden_states"].shape[-2:]
    patch = int(config.patch_size)
    if arguments["hidden_states"].ndim != 4:
        raise ValueError("packed images are not known here")
    grid = rows // patch * (columns // patch)
    largest = int(config.max_resolution[0]) * int(config.max_resolution[1]) // patch**2
    padding = 0 if rows == columns else largest - grid
    # the last hidden states of Llama stand before those that each layer gets for itself
    llama = int(arguments["encoder_hidden_states_llama3"][0].shape[1])
    return image_layout(patch, arguments, suffix=padding + int(arguments["encoder_hidden_states_t5"].shape[1]) + 2 * llama)


HIDREAM_IMAGE = ModelFamily(
    name="HiDream",
    transformer_classes=("HiDreamImageTransformer2DModel",),
    layout=layout,
    time=lambda arguments: arguments.get("timesteps"),
    self_attention=r"(double_stream_blocks|single_stream_blocks)\.\d+\.block\.attn1",
    dispatches=False,
    notes="text after the image, protected, and the padding of images that are not square as well; SDPA calls are redirected",
)
