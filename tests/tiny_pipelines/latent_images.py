"""Image families that take the latents of an image as they are: 30 x 44 image tokens, 11 blocks with the text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tiny_pipelines.packed_images import COLUMNS, ROWS, vae
from tiny_pipelines.pipeline import HEAD_SIZE, HEADS, LAYERS, TinyPipeline, enlarge_weights, noise

WIDTH = HEADS * HEAD_SIZE
# the tiny VAE makes one latent of a pixel, and a patch is 2 x 2 latents
PIXELS = {"height": 2 * ROWS, "width": 2 * COLUMNS}


def first(count: int, of: int) -> Tensor:
    """A mask of one prompt with padding at its end."""
    return torch.arange(of).lt(count).unsqueeze(0)


def stable_diffusion_3() -> TinyPipeline:
    """SD 3.5 Medium's arrangement: the first layer has a second attention, of the image alone."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=2 * COLUMNS,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS - 1,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=40,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=20,
        pos_embed_max_size=64,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    encoders = {f"{kind}{number}": None for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")}
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), **encoders)
    text = {
        "prompt_embeds": noise(1, 10, 40),
        "pooled_prompt_embeds": noise(1, 20),
        "negative_prompt_embeds": noise(1, 10, 40, seed=2),
        "negative_pooled_prompt_embeds": noise(1, 20, seed=2),
        "guidance_scale": 2.0,
    }
    return TinyPipeline(pipe, {**text, **PIXELS})


def hunyuan_image() -> TinyPipeline:
    """HunyuanImage: text of two encoders, both padded."""
    from diffusers import AutoencoderKLHunyuanImage, HunyuanImagePipeline, HunyuanImageTransformer2DModel

    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_SIZE,
        num_layers=1,
        num_single_layers=LAYERS - 1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=24,
        text_embed_2_dim=16,
        rope_axes_dim=(16, 16),
        guidance_embeds=True,
    )
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer}
    pipe = HunyuanImagePipeline(
        **parts,
        vae=AutoencoderKLHunyuanImage(3, 3, 4, (32, 32), 1, spatial_compression_ratio=2, sample_size=32),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    text = {
        "prompt_embeds": noise(1, 20, 24),
        "prompt_embeds_mask": first(15, of=20).long(),
        "prompt_embeds_2": noise(1, 12, 16),
        "prompt_embeds_mask_2": first(5, of=12).long(),
    }
    return TinyPipeline(pipe, {**text, **PIXELS})


def aura_flow() -> TinyPipeline:
    """AuraFlow: one joint and one single-stream layer, 8 register tokens before the text."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=2 * COLUMNS,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=LAYERS - 1,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=40,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=64 * 64,
    )
    enlarge_weights(transformer)
    parts: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer, "vae": vae()}
    text = {
        "prompt_embeds": noise(1, 10, 40),
        "prompt_attention_mask": first(10, of=10),
        "negative_prompt_embeds": noise(1, 10, 40, seed=2),
        "negative_prompt_attention_mask": first(10, of=10),
        "guidance_scale": 2.0,
    }
    return TinyPipeline(AuraFlowPipeline(**parts, text_encoder=None, tokenizer=None), {**text, **PIXELS})


def cogview4() -> TinyPipeline:
    """CogView 4: its pipeline wants multiples of 16, so 24 x 56 image tokens."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        text_embed_dim=24,
        time_embed_dim=16,
        condition_dim=8,
        sample_size=2 * COLUMNS,
    )
    parts: dict[str, Any] = {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer, "vae": vae()}
    text = {"prompt_embeds": noise(1, 16, 24), "negative_prompt_embeds": noise(1, 16, 24, seed=2), "guidance_scale": 2.0}
    return TinyPipeline(CogView4Pipeline(**parts, text_encoder=None, tokenizer=None), {**text, "height": 48, "width": 112})
