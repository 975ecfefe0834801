"""Helios: earlier frames at three sizes, then the chunk's video, in self-attention (`attn1`); text is separate cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, patch_triple
from ditattn.models.history import behind_history

__all__ = ["HELIOS"]

# frames, rows and columns of latents that make one token, in the order in which they stand before the chunk
HISTORY = {"long": (4, 8, 8), "mid": (2, 4, 4), "short": (1, 2, 2)}


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, T, H, W)`, the chunk's own frames; the history is in arguments of its own, used with its indices."""
    history = [
        (arguments.get(f"latents_history_{name}") if arguments.get(f"indices_latents_history_{name}") is not None else None, patch)
        for name, patch in HISTORY.items()
    ]
    return behind_history(arguments["hidden_states"], patch_triple(config), history)


HELIOS = ModelFamily(
    name="Helios",
    transformer_classes=("HeliosTransformer3DModel",),
    layout=layout,
    self_attention=r"blocks\.\d+\.attn1",
    size_multiple=16,
    full_precision_vaes=frozenset({"AutoencoderKLWan"}),
    notes="earlier frames before the chunk's video have blocks of their own; steps begin anew with every chunk",
)
