"""SkyReels V2: video tokens only in self-attention (`attn1`), as in Wan; a diffusion-forcing model has a timestep for each frame."""

from __future__ import annotations

from ditattn.models.base import ModelFamily, video_only
from ditattn.models.wan import frames_to_ask, untrue_notices

__all__ = ["SKYREELS_V2"]

PIPELINES = ("", "_i2v", "_diffusion_forcing", "_diffusion_forcing_i2v", "_diffusion_forcing_v2v")

SKYREELS_V2 = ModelFamily(
    name="SkyReels V2",
    transformer_classes=("SkyReelsV2Transformer3DModel",),
    layout=video_only,
    self_attention=r"blocks\.\d+\.attn1",
    size_multiple=16,
    frames_to_ask=frames_to_ask,
    full_precision_vaes=frozenset({"AutoencoderKLWan"}),
    untrue_notices=untrue_notices(*(f"skyreels_v2.pipeline_skyreels_v2{name}" for name in PIPELINES)),
    notes="text and image to video, diffusion forcing; with `causal_block_size` above 1 every call brings a causal mask and runs densely",
)
