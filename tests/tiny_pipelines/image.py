"""Image families: 30 x 44 image tokens behind the text, 11 blocks."""

from __future__ import annotations

from typing import Any

import torch

from tiny_pipelines.pipeline import HEAD_SIZE, HEADS, LAYERS, TinyPipeline, noise

# sums to the head size
ROPE_AXES = (8, 12, 12)


def flux() -> TinyPipeline:
    """Flux.1: one double-stream and one single-stream layer."""
    from diffusers import FluxPipeline

    return TinyPipeline(FluxPipeline(**_flux_parts()), _flux_arguments())


def flux_kontext() -> TinyPipeline:
    """Flux.1 Kontext: a reference image of 16 x 16 tokens behind the image."""
    from diffusers import FluxKontextPipeline

    pipe = FluxKontextPipeline(**_flux_parts())
    return TinyPipeline(pipe, {**_flux_arguments(), "image": noise(1, 4, 32, 32, seed=3), "max_area": 60 * 88, "_auto_resize": False})


def qwen_image(batch: int = 1) -> TinyPipeline:
    """Qwen-Image: text and image in one joint attention."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=20,
        axes_dims_rope=ROPE_AXES,
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, vae=vae, text_encoder=None, tokenizer=None
    )
    mask = torch.ones(batch, 7, dtype=torch.long)
    return TinyPipeline(
        pipe,
        {
            "prompt_embeds": noise(batch, 7, 20),
            "prompt_embeds_mask": mask,
            "negative_prompt_embeds": noise(batch, 7, 20, seed=2),
            "negative_prompt_embeds_mask": mask.clone(),
            "true_cfg_scale": 2.0,
            "height": 240,
            "width": 352,
        },
    )


def flux_with_hidden_image_tokens() -> TinyPipeline:
    """Flux.1 whose attention gets a mask that hides a token in the middle of the image."""
    tiny = flux()
    mask = torch.ones(1, 1, 1, 10 + 30 * 44, dtype=torch.bool)
    mask[..., 500] = False
    tiny.arguments["joint_attention_kwargs"] = {"attention_mask": mask}
    return tiny


def _flux_parts() -> dict[str, Any]:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=LAYERS - 1,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=40,
        pooled_projection_dim=20,
        axes_dims_rope=ROPE_AXES,
        guidance_embeds=True,
    )
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,),
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer, "vae": vae}
    return {**parts, "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}


def _flux_arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, 10, 40),
        "pooled_prompt_embeds": noise(1, 20),
        "negative_prompt_embeds": noise(1, 10, 40, seed=2),
        "negative_pooled_prompt_embeds": noise(1, 20, seed=2),
        "true_cfg_scale": 2.0,
        "height": 60,
        "width": 88,
    }
