"""Kandinsky 5: video tokens only in the self-attention of its visual blocks; text has blocks of its own and is cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, patch_triple
from ditattn.models.wan import frames_to_ask, untrue_notices

__all__ = ["KANDINSKY5"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, T, H, W, C)`.

    Raises:
        ValueError: the model's own sparse attention is on, for which tokens stand in another order.
    """
    if arguments.get("sparse_params") is not None:
        raise ValueError("tokens stand in 8 x 8 squares for the model's own sparse attention")
    batch, frames, rows, columns, channels = arguments["hidden_states"].shape
    return TokenLayout((batch, channels, frames, rows, columns), patch_triple(config))


KANDINSKY5 = ModelFamily(
    name="Kandinsky 5",
    transformer_classes=("Kandinsky5Transformer3DModel",),
    layout=layout,
    self_attention=r"visual_transformer_blocks\.\d+\.self_attention",
    head_size=lambda config: sum(config.axes_dims),
    size_multiple=16,
    frames_to_ask=frames_to_ask,
    untrue_notices=untrue_notices("kandinsky5.pipeline_kandinsky", "kandinsky5.pipeline_kandinsky_i2v"),
    notes="video and images; checkpoints with attention of type nabla bring FlexAttention masks, which end in an error: leave those alone",
)
