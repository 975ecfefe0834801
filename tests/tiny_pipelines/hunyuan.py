"""The later families of HunyuanVideo: 5 x 14 x 20 tokens and what stands beside them."""

from __future__ import annotations

from typing import Any

import torch

from tiny_pipelines.loop import looped
from tiny_pipelines.pipeline import ATTENTION, LAYERS, TinyPipeline, denoiser, first, noise, parts

SHARED: dict[str, Any] = {
    **ATTENTION,
    "num_refiner_layers": 1,
    "rope_axes_dim": (8, 12, 12),
    "text_embed_dim": 24,
}


def hunyuan_video15() -> TinyPipeline:
    """HunyuanVideo 1.5: 3 glyph, 9 text and 729 unused image tokens behind the video, and 5 padded ones, 16 blocks."""
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )

    transformer = denoiser(
        HunyuanVideo15Transformer3DModel,
        **SHARED,
        in_channels=9,
        out_channels=4,
        num_layers=LAYERS,
        text_embed_2_dim=16,
        image_embed_dim=12,
        task_type="t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8, 8),
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    )
    pipe = HunyuanVideo15Pipeline(**parts(transformer, vae, encoders=2), guider=ClassifierFreeGuidance(2.0))
    text: dict[str, Any] = {}
    for prefix, seed in (("", 1), ("negative_", 2)):
        text |= {f"{prefix}prompt_embeds": noise(1, 12, 24, seed=seed), f"{prefix}prompt_embeds_mask": first(9, of=12).long()}
        text |= {f"{prefix}prompt_embeds_2": noise(1, 5, 16, seed=seed), f"{prefix}prompt_embeds_mask_2": first(3, of=5).long()}
    return TinyPipeline(pipe, {**text, "height": 224, "width": 320, "num_frames": 17})


def hunyuan_video_framepack() -> TinyPipeline:
    """HunyuanVideo Framepack: 140 + 70 + 18 tokens of earlier frames before the video, 6 image and 25 text tokens behind it, 13 blocks."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    transformer = denoiser(
        HunyuanVideoFramepackTransformer3DModel,
        **SHARED,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=LAYERS - 1,
        pooled_projection_dim=12,
        has_image_proj=True,
        image_proj_dim=16,
        has_clean_x_embedder=True,
    )
    rows, columns = 28, 40
    inputs = {
        "prompt_embeds": noise(1, 40, 24),
        "encoder_attention_mask": first(25, of=40).long(),
        "pooled_projections": noise(1, 12),
        "image_embeds": noise(1, 6, 16),
        "guidance": torch.tensor([6000.0]),
        "indices_latents": torch.arange(7, 12),
        "latents_clean": noise(1, 4, 1, rows, columns, seed=3),
        "indices_latents_clean": torch.tensor([6]),
        "latents_history_2x": noise(1, 4, 2, rows, columns, seed=4),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_history_4x": noise(1, 4, 4, rows, columns, seed=5),
        "indices_latents_history_4x": torch.arange(4),
    }
    return looped(transformer, (1, 4, 5, rows, columns), inputs)
