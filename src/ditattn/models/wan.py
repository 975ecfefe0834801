"""Wan 2.1 and 2.2: video tokens only in self-attention (`attn1`); text, and in image-to-video the image, are separate cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import DEFAULT_FRAME_RATE, ModelFamily, TokenLayout, one_more_than_a_multiple, patch_triple, prefix_and_rest

__all__ = ["WAN"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, T, H, W)`."""
    return TokenLayout(tuple(arguments["hidden_states"].shape), patch_triple(config))


def frame_rate(pipeline_config: Any) -> int:
    """16, except Wan 2.2 TI2V, whose first-frame conditioning is told by `expand_timesteps`."""
    return DEFAULT_FRAME_RATE if getattr(pipeline_config, "expand_timesteps", False) else 16


def frames_to_ask(num_frames: int, factor: int) -> int:
    """Where the VAE does not compress time, the pipelines' rounding tests n % 1 != 1, which is always so, and adds one."""
    return num_frames - 1 if factor == 1 else one_more_than_a_multiple(num_frames, factor)


# the count is checked beforehand, and this appears even where their rounding gives what was asked
ROUNDING_NOTICE = "num_frames - 1"

WAN = ModelFamily(
    name="Wan 2.1, Wan 2.2",
    transformer_classes=("WanTransformer3DModel",),
    layout=layout,
    self_attention=r"blocks\.\d+\.attn1",
    frame_rate=frame_rate,
    size_multiple=16,
    frames_to_ask=frames_to_ask,
    full_precision_vaes=frozenset({"AutoencoderKLWan"}),
    untrue_notices={f"diffusers.pipelines.wan.{name}": ROUNDING_NOTICE for name in ("pipeline_wan", "pipeline_wan_i2v")},
    streams=prefix_and_rest,
    notes="text and image to video; the two transformers of Wan 2.2 share one step count",
)
