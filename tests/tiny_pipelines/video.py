"""Video families other than Wan: 5 x 14 x 20 tokens and text, or 5 x 16 x 16 tokens: 10 to 12 blocks."""

from __future__ import annotations

from typing import Any

from tiny_pipelines.pipeline import (
    ATTENTION,
    HEAD_SIZE,
    HEADS,
    LAYERS,
    SIZES,
    TinyPipeline,
    denoiser,
    first,
    noise,
    parts,
    picture,
    prompt_masks,
    prompts,
)


def hunyuan_video() -> TinyPipeline:
    """HunyuanVideo: one double-stream and one single-stream layer; 40 text tokens behind the video, 25 of them real."""
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

    transformer = denoiser(
        HunyuanVideoTransformer3DModel,
        **SIZES,
        num_layers=1,
        num_single_layers=LAYERS - 1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=24,
        pooled_projection_dim=12,
        rope_axes_dim=(8, 12, 12),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = HunyuanVideoPipeline(**parts(transformer, vae, FlowMatchEulerDiscreteScheduler(shift=7.0), encoders=2))
    text = {"prompt_embeds": noise(1, 40, 24), "pooled_prompt_embeds": noise(1, 12), "prompt_attention_mask": first(25, of=40).long()}
    return TinyPipeline(pipe, {**text, "height": 224, "width": 320, "num_frames": 17})


def ltx_video() -> TinyPipeline:
    """LTX-Video: packed latents, text in cross-attention with a mask."""
    from diffusers import LTXPipeline

    return TinyPipeline(LTXPipeline(**_ltx_parts()), {**_ltx_text(), "height": 32, "width": 32, "num_frames": 9})


def ltx_condition(*conditions: tuple[int, int]) -> TinyPipeline:
    """LTX-Video with conditions: (first frame, frames) of each; those on frame 0 replace tokens, the others stand before the video."""
    from diffusers import LTXConditionPipeline
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    shown = []
    for number, (begin, frames) in enumerate(conditions):
        pictures = [picture(32, 32, seed=10 * number + frame) for frame in range(frames)]
        shown.append(LTXVideoCondition(frame_index=begin, **({"image": pictures[0]} if frames == 1 else {"video": pictures})))
    given = {"conditions": shown} if shown else {}
    return TinyPipeline(LTXConditionPipeline(**_ltx_parts()), {**_ltx_text(), **given, "height": 32, "width": 32, "num_frames": 9})


def _ltx_parts() -> dict[str, Any]:
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    transformer = denoiser(
        LTXVideoTransformer3DModel,
        in_channels=6,
        out_channels=6,
        **ATTENTION,
        cross_attention_dim=HEADS * HEAD_SIZE,
        num_layers=LAYERS,
        caption_channels=24,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=6,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False, False, False),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=1,
    )
    return parts(transformer, vae)


def _ltx_text() -> dict[str, Any]:
    masks = prompt_masks(9, 4, of=12)
    return {**prompts(1, 12, 24), **{name: mask.long() for name, mask in masks.items()}}


def cogvideox(scheduler: str = "CogVideoXDPMScheduler", num_layers: int = LAYERS) -> TinyPipeline:
    """CogVideoX: 12 text tokens before the video; its processors call torch's SDPA themselves. `scheduler` is a diffusers class."""
    import diffusers

    transformer = denoiser(
        diffusers.CogVideoXTransformer3DModel,
        **SIZES,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=num_layers,
        sample_width=40,
        sample_height=28,
        sample_frames=17,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=12,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipe = diffusers.CogVideoXPipeline(**parts(transformer, vae, getattr(diffusers, scheduler)()))
    return TinyPipeline(pipe, {**prompts(1, 12, 24), "guidance_scale": 6.0, "height": 224, "width": 320, "num_frames": 17})
