"""Helios: earlier frames at three sizes, then the chunk's video, in self-attention (`attn1`); text is separate cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, num_patches, patch_triple

__all__ = ["HELIOS"]

# frames, rows and columns of latents that make one token
HISTORY = {"short": (1, 2, 2), "mid": (2, 4, 4), "long": (4, 8, 8)}


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, T, H, W)`, the chunk's own frames; the history is in arguments of its own, used with its indices."""
    history = sum(
        num_patches(arguments[f"latents_history_{name}"], patch)
        for name, patch in HISTORY.items()
        if arguments.get(f"latents_history_{name}") is not None and arguments.get(f"indices_latents_history_{name}") is not None
    )
    return TokenLayout(tuple(arguments["hidden_states"].shape), patch_triple(config), num_prefix_tokens=history)


HELIOS = ModelFamily(
    name="Helios",
    transformer_classes=("HeliosTransformer3DModel",),
    layout=layout,
    self_attention=r"blocks\.\d+\.attn1",
    size_multiple=16,
    full_precision_vaes=frozenset({"AutoencoderKLWan"}),
    notes="earlier frames before the chunk's video, protected; steps begin anew with every chunk",
)
