"""Image families that take the latents of an image as they are: 30 x 44 image tokens, 11 blocks with the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiny_pipelines.autoencoders import flat_autoencoder
from tiny_pipelines.loop import looped_by
from tiny_pipelines.packed_images import COLUMNS, PIXELS, ROWS
from tiny_pipelines.pipeline import (
    HEADS,
    LAYERS,
    SIZES,
    WIDTH,
    TinyPipeline,
    denoiser,
    enlarged_denoiser,
    first,
    noise,
    parts,
    prompt_masks,
    prompts,
)

# of the latents
SHAPE = (1, 4, 2 * ROWS, 2 * COLUMNS)


def stable_diffusion_3() -> TinyPipeline:
    """SD 3.5 Medium's arrangement: the first layer has a second attention, of the image alone."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = denoiser(
        SD3Transformer2DModel,
        sample_size=2 * COLUMNS,
        patch_size=2,
        num_layers=LAYERS - 1,
        **SIZES,
        joint_attention_dim=40,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=20,
        pos_embed_max_size=64,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    pipe = StableDiffusion3Pipeline(**parts(transformer, flat_autoencoder(), encoders=3))
    pooled = {"pooled_prompt_embeds": noise(1, 20), "negative_pooled_prompt_embeds": noise(1, 20, seed=2)}
    return TinyPipeline(pipe, {**prompts(1, 10, 40), **pooled, "guidance_scale": 2.0, **PIXELS})


def hunyuan_image() -> TinyPipeline:
    """HunyuanImage: text of two encoders, both padded."""
    from diffusers import AutoencoderKLHunyuanImage, HunyuanImagePipeline, HunyuanImageTransformer2DModel

    transformer = denoiser(
        HunyuanImageTransformer2DModel,
        **SIZES,
        num_layers=1,
        num_single_layers=LAYERS - 1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=24,
        text_embed_2_dim=16,
        rope_axes_dim=(16, 16),
        guidance_embeds=True,
    )
    vae = AutoencoderKLHunyuanImage(3, 3, 4, (32, 32), 1, spatial_compression_ratio=2, sample_size=32)
    pipe = HunyuanImagePipeline(**parts(transformer, vae, encoders=2))
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

    transformer = enlarged_denoiser(
        AuraFlowTransformer2DModel,
        sample_size=2 * COLUMNS,
        patch_size=2,
        num_mmdit_layers=1,
        num_single_dit_layers=LAYERS - 1,
        **SIZES,
        joint_attention_dim=40,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=64 * 64,
    )
    pipe = AuraFlowPipeline(**parts(transformer, flat_autoencoder()))
    return TinyPipeline(pipe, {**prompts(1, 10, 40), **prompt_masks(10, 10, of=10), "guidance_scale": 2.0, **PIXELS})


COGVIEW: dict[str, Any] = {
    **SIZES,
    "patch_size": 2,
    "num_layers": LAYERS,
    "text_embed_dim": 24,
    "time_embed_dim": 16,
    "condition_dim": 8,
}


def cogview4() -> TinyPipeline:
    """CogView 4: its pipeline wants multiples of 16, so 24 x 56 image tokens."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel

    transformer = denoiser(CogView4Transformer2DModel, **COGVIEW, sample_size=2 * COLUMNS)
    pipe = CogView4Pipeline(**parts(transformer, flat_autoencoder()))
    return TinyPipeline(pipe, {**prompts(1, 16, 24), "guidance_scale": 2.0, "height": 48, "width": 112})


def cogview3_plus() -> TinyPipeline:
    """CogView 3 Plus, whose pipeline wants multiples of 8 and a scheduler of its own: in a loop."""
    from diffusers import CogView3PlusTransformer2DModel

    transformer = enlarged_denoiser(CogView3PlusTransformer2DModel, **COGVIEW, pos_embed_max_size=64, sample_size=2 * COLUMNS)
    sizes = torch.tensor([[2 * ROWS, 2 * COLUMNS]])

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        conditions = {"original_size": sizes, "target_size": sizes, "crop_coords": torch.zeros(1, 2)}
        return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": timestep, **conditions}

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 10, 24))


def z_image() -> TinyPipeline:
    """Z-Image: a layer of the image alone, then a joint one; the image is padded by 24 tokens, the texts to 32."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    transformer = enlarged_denoiser(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=WIDTH,
        n_layers=LAYERS - 1,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=24,
        axes_dims=[8, 12, 12],
        axes_lens=[64, 64, 64],
    )
    # the pads are empty memory
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    pipe = ZImagePipeline(**parts(transformer, flat_autoencoder()))
    text = {"prompt_embeds": [noise(32, 24)], "negative_prompt_embeds": [noise(12, 24, seed=2)], "guidance_scale": 2.0}
    return TinyPipeline(pipe, {**text, **PIXELS})


def lumina2() -> TinyPipeline:
    """Lumina Image 2: a layer of the image alone, then a joint one; 12 text tokens, of which 9 and 4 are real."""
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    transformer = enlarged_denoiser(
        Lumina2Transformer2DModel,
        sample_size=2 * COLUMNS,
        patch_size=2,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=LAYERS - 1,
        num_refiner_layers=1,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 12, 12),
        axes_lens=(64, 64, 64),
        cap_feat_dim=24,
    )
    pipe = Lumina2Pipeline(**parts(transformer, flat_autoencoder()))
    text = {**prompts(1, 12, 24), **prompt_masks(9, 4, of=12), "guidance_scale": 2.0}
    # its pipeline counts 8 pixels to a latent whatever the VAE does
    return TinyPipeline(pipe, {**text, "height": 16 * ROWS, "width": 16 * COLUMNS})


def hidream_image() -> TinyPipeline:
    """HiDream: 24 x 44 image tokens padded to 36 x 36, text of T5 and of three layers of Llama."""
    from diffusers import HiDreamImageTransformer2DModel

    transformer = enlarged_denoiser(
        HiDreamImageTransformer2DModel,
        patch_size=2,
        num_layers=1,
        num_single_layers=LAYERS - 1,
        **SIZES,
        caption_channels=[24, 16],
        text_emb_dim=20,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 12, 12),
        max_resolution=(72, 72),
        llama_layers=[0, 1],
    )

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        llama = torch.stack([text[:, :6, :16], text[:, :6, 8:]])
        named = {"encoder_hidden_states_t5": text, "encoder_hidden_states_llama3": llama, "pooled_embeds": noise(1, 20)}
        return {"hidden_states": latents, "timesteps": timestep, **named}

    return looped_by(transformer, arguments_of, (1, 4, 48, 88), noise(1, 10, 24))


def ernie_image() -> TinyPipeline:
    """ERNIE-Image: 12 text tokens of which 9 are real."""
    from diffusers import ErnieImageTransformer2DModel

    transformer = enlarged_denoiser(
        ErnieImageTransformer2DModel,
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_layers=LAYERS,
        ffn_hidden_size=48,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        text_in_dim=24,
        rope_axes_dim=(8, 12, 12),
    )

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {"hidden_states": latents, "timestep": timestep, "text_bth": text, "text_lens": torch.tensor([9])}

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 12, 24))


def glm_image() -> TinyPipeline:
    """GLM-Image."""
    from diffusers import GlmImageTransformer2DModel

    transformer = enlarged_denoiser(GlmImageTransformer2DModel, **COGVIEW, prior_vq_quantizer_codebook_size=32)
    prior = torch.arange(ROWS * COLUMNS).remainder(32).unsqueeze(0)
    sizes = torch.tensor([[2.0 * ROWS, 2.0 * COLUMNS]])

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": text,
            "prior_token_id": prior,
            "prior_token_drop": torch.zeros_like(prior, dtype=torch.bool),
            "timestep": timestep - 1,
            "target_size": sizes,
            "crop_coords": torch.zeros(1, 2),
        }

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 10, 24))


JOYIMAGE: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "in_channels": 4,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "text_dim": 24,
    "num_layers": LAYERS,
    "rope_dim_list": [8, 12, 12],
}


def joyimage_edit() -> TinyPipeline:
    """JoyImage Edit: an image of 32 x 32 tokens, and one of the same size that it is made from."""
    from diffusers import JoyImageEditTransformer3DModel

    transformer = enlarged_denoiser(JoyImageEditTransformer3DModel, **JOYIMAGE)
    given = noise(1, 1, 4, 1, 64, 64, seed=3)

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        # the model moves the last one, which is the image itself, to the front and back
        return {"hidden_states": torch.cat([given, latents], 1), "timestep": timestep, "encoder_hidden_states": text}

    return looped_by(transformer, arguments_of, (1, 1, 4, 1, 64, 64), noise(1, 10, 24), image_last=True)


def joyimage_edit_plus() -> TinyPipeline:
    """JoyImage Edit Plus: an image of 30 x 36 tokens, one of 8 x 12 behind it, 4 patches of padding, 12 text tokens of which 9 are real."""
    from diffusers import JoyImageEditPlusTransformer3DModel

    transformer = enlarged_denoiser(JoyImageEditPlusTransformer3DModel, **JOYIMAGE)
    given = torch.cat([noise(1, 96, 4, 1, 2, 2, seed=3), torch.zeros(1, 4, 4, 1, 2, 2)], 1)

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": torch.cat([latents, given], 1),
            "timestep": timestep,
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": first(9, of=12).float(),
            "shape_list": [[(1, 30, 36), (1, 8, 12)]],
        }

    return looped_by(transformer, arguments_of, (1, 1080, 4, 1, 2, 2), noise(1, 12, 24))


def pixart() -> TinyPipeline:
    """PixArt Sigma: the image in self-attention, the text in cross-attention."""
    from diffusers import PixArtTransformer2DModel

    transformer = enlarged_denoiser(
        PixArtTransformer2DModel,
        **SIZES,
        num_layers=LAYERS,
        cross_attention_dim=WIDTH,
        sample_size=2 * COLUMNS,
        caption_channels=24,
        use_additional_conditions=False,
    )

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        named = {"encoder_attention_mask": first(9, of=12), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return {"hidden_states": latents, "encoder_hidden_states": text, "timestep": timestep, **named}

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 12, 24))


def prx() -> TinyPipeline:
    """PRX: 12 text tokens of which 9 are real, as keys before those of the image."""
    from diffusers import PRXTransformer2DModel

    transformer = enlarged_denoiser(
        PRXTransformer2DModel,
        in_channels=4,
        patch_size=2,
        context_in_dim=24,
        hidden_size=WIDTH,
        mlp_ratio=1.5,
        num_heads=HEADS,
        depth=LAYERS,
        axes_dim=[16, 16],
    )

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        mask = first(9, of=12)
        return {"hidden_states": latents, "timestep": timestep / 1000, "encoder_hidden_states": text, "attention_mask": mask}

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 12, 24))


def hunyuan_dit() -> TinyPipeline:
    """HunyuanDiT with heads of 88, as published: the image in self-attention, the text in cross-attention."""
    from diffusers import HunyuanDiT2DModel

    transformer = enlarged_denoiser(
        HunyuanDiT2DModel,
        num_attention_heads=1,
        attention_head_dim=88,
        hidden_size=88,
        in_channels=4,
        patch_size=2,
        sample_size=2 * COLUMNS,
        num_layers=LAYERS,
        mlp_ratio=1.5,
        learn_sigma=False,
        cross_attention_dim=24,
        cross_attention_dim_t5=16,
        pooled_projection_dim=20,
        text_len=12,
        text_len_t5=6,
        use_style_cond_and_image_meta_size=False,
    )

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        second = {"encoder_hidden_states_t5": noise(1, 6, 16, seed=3), "text_embedding_mask_t5": first(4, of=6)}
        first_text = {"encoder_hidden_states": text, "text_embedding_mask": first(9, of=12)}
        return {"hidden_states": latents, "timestep": timestep.float(), **first_text, **second}

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 12, 24))


def lumina_next() -> TinyPipeline:
    """Lumina-Next with heads of 72, as published: the image in self-attention, the text in cross-attention."""
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    transformer = enlarged_denoiser(
        LuminaNextDiT2DModel,
        sample_size=2 * COLUMNS,
        in_channels=4,
        hidden_size=72,
        num_layers=LAYERS,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        learn_sigma=False,
        cross_attention_dim=24,
    )
    rotations = get_2d_rotary_pos_embed_lumina(72, 64, 64)

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        named = {"encoder_hidden_states": text, "encoder_mask": first(9, of=12), "image_rotary_emb": rotations}
        return {"hidden_states": latents, "timestep": 1 - timestep / 1000, **named, "cross_attention_kwargs": {}}

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 12, 24))
