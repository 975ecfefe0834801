"""AnyFlow: Wan's blocks with a source and a target timestep; video tokens only in self-attention (`attn1`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, patch_triple
from ditattn.models.wan import frame_rate, frames_to_ask, untrue_notices

__all__ = ["ANYFLOW"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, T, C, H, W)`."""
    batch, frames, channels, rows, columns = arguments["hidden_states"].shape
    return TokenLayout((batch, channels, frames, rows, columns), patch_triple(config))


ANYFLOW = ModelFamily(
    name="AnyFlow",
    transformer_classes=("AnyFlowTransformer3DModel",),
    layout=layout,
    self_attention=r"blocks\.\d+\.attn1",
    frame_rate=frame_rate,
    size_multiple=16,
    frames_to_ask=frames_to_ask,
    full_precision_vaes=frozenset({"AutoencoderKLWan"}),
    untrue_notices=untrue_notices("anyflow.pipeline_anyflow"),
    notes="the bidirectional models; runs have few steps, so `skip_first_steps` must be small",
)
