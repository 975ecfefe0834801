"""Wan 2.1 and 2.2: video tokens only in self-attention (`attn1`); text, and in image-to-video the image, are separate cross-attention."""

from __future__ import annotations

from typing import Any

from ditattn.models.base import DEFAULT_FRAME_RATE, ModelFamily, one_more_than_a_multiple, one_stream, video_only

__all__ = ["WAN", "frames_to_ask", "untrue_notices"]


def frame_rate(pipeline_config: Any) -> int:
    """16, except Wan 2.2 TI2V, whose first-frame conditioning is told by `expand_timesteps`."""
    return DEFAULT_FRAME_RATE if getattr(pipeline_config, "expand_timesteps", False) else 16


def frames_to_ask(num_frames: int, factor: int) -> int:
    """Where the VAE does not compress time, the pipelines' rounding tests n % 1 != 1, which is always so, and adds one."""
    return num_frames - 1 if factor == 1 else one_more_than_a_multiple(num_frames, factor)


def untrue_notices(*pipelines: str) -> dict[str, str]:
    """Of the pipelines' files that warn of rounding `num_frames`: it is checked beforehand, and they warn even where it stays as asked."""
    return {f"diffusers.pipelines.{name}": "num_frames - 1" for name in pipelines}


# of Wan's own repository, whose blocks msmodelslim quantises
CHECKPOINT_NAMES = (
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(k|v)_img$", r".add_\1_proj"),
    (r"(?<=attn[12])\.(q|k|v)$", r".to_\1"),
    (r"(?<=attn[12])\.o$", ".to_out.0"),
    (r"\.ffn\.0$", ".ffn.net.0.proj"),
    (r"\.ffn\.2$", ".ffn.net.2"),
)

WAN = ModelFamily(
    name="Wan 2.1, Wan 2.2",
    transformer_classes=("WanTransformer3DModel",),
    layout=video_only,
    self_attention=r"blocks\.\d+\.attn1",
    checkpoint_names=CHECKPOINT_NAMES,
    checkpoint_folders={"transformer": "high_noise_model", "transformer_2": "low_noise_model"},
    frame_rate=frame_rate,
    size_multiple=16,
    frames_to_ask=frames_to_ask,
    full_precision_vaes=frozenset({"AutoencoderKLWan"}),
    untrue_notices=untrue_notices("wan.pipeline_wan", "wan.pipeline_wan_i2v", "lucy.pipeline_lucy_edit"),
    streams=one_stream,
    notes="text, image and video to video, Lucy Edit; the two transformers of Wan 2.2 share one step count",
)
