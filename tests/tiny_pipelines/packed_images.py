"""Image families whose tokens are packed and told by their positions, as in Flux: 30 x 44 image tokens, 11 blocks with the text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tiny_pipelines.autoencoders import flat_autoencoder, flux2_autoencoder, qwen_autoencoder
from tiny_pipelines.loop import looped_by
from tiny_pipelines.pipeline import (
    ATTENTION,
    LAYERS,
    TinyPipeline,
    denoiser,
    enlarge_weights,
    enlarged_denoiser,
    first,
    noise,
    parts,
    picture,
    prompt_masks,
    prompts,
)

ROWS, COLUMNS = 30, 44
# the flat VAE makes one latent of a pixel, and a patch is 2 x 2 latents
PIXELS = {"height": 2 * ROWS, "width": 2 * COLUMNS}
# of the latents
SHAPE = (1, ROWS * COLUMNS, 16)
# sums to the head size
ROPE_AXES = (8, 12, 12)
FLUX_SIZES: dict[str, Any] = {**ATTENTION, "num_layers": 1, "num_single_layers": LAYERS - 1}


def position_ids(rows: int = ROWS, columns: int = COLUMNS, image: int = 0, width: int = 3) -> Tensor:
    """(S, width): number of the image, row, column, zeros."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    ids = torch.zeros(rows * columns, width)
    ids[:, 0], ids[:, 1:3] = image, grid
    return ids


def flux2(reference: tuple[int, int] | None = None) -> TinyPipeline:
    """Flux 2: one double-stream and one single-stream layer; perhaps a reference image of so many rows and columns of tokens."""
    from diffusers import Flux2Pipeline, Flux2Transformer2DModel

    transformer = denoiser(
        Flux2Transformer2DModel,
        **FLUX_SIZES,
        in_channels=16,
        joint_attention_dim=40,
        timestep_guidance_channels=16,
        axes_dims_rope=(8, 8, 8, 8),
    )
    pipe = Flux2Pipeline(**parts(transformer, flux2_autoencoder()))
    images = {} if reference is None else {"image": picture(2 * reference[0], 2 * reference[1])}
    return TinyPipeline(pipe, {"prompt_embeds": noise(1, 10, 40), **PIXELS, **images})


def flux3() -> TinyPipeline:
    """Flux 3 with a reference image of 8 x 8 tokens: a layer of the image alone, then a joint one."""
    from diffusers import Flux3Transformer2DModel

    transformer = denoiser(
        Flux3Transformer2DModel,
        **FLUX_SIZES,
        in_channels=16,
        cond_in_channels=16,
        joint_attention_dim=40,
        timestep_channels=16,
        axes_dims_rope=(8, 8, 8, 8),
    )

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": text,
            "timestep": timestep / 1000,
            "img_ids": position_ids(width=4),
            "txt_ids": torch.zeros(text.shape[1], 4),
            "image_cond_hidden_states": noise(1, 64, 16, seed=3),
            "image_cond_ids": position_ids(8, 8, image=10, width=4),
        }

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 10, 40))


def chroma() -> TinyPipeline:
    """Chroma: 12 text tokens of which 9 are real, so that a mask hides tokens before the image."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    transformer = denoiser(
        ChromaTransformer2DModel,
        **FLUX_SIZES,
        in_channels=16,
        joint_attention_dim=40,
        axes_dims_rope=ROPE_AXES,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = ChromaPipeline(**parts(transformer, flat_autoencoder()))
    return TinyPipeline(pipe, {**prompts(1, 12, 40), **prompt_masks(9, 4, of=12), "guidance_scale": 2.0, **PIXELS})


def bria() -> TinyPipeline:
    """Bria 3.2."""
    from diffusers import BriaPipeline, BriaTransformer2DModel

    transformer = denoiser(BriaTransformer2DModel, **FLUX_SIZES, in_channels=16, joint_attention_dim=40, axes_dims_rope=list(ROPE_AXES))
    pipe = BriaPipeline(**parts(transformer, flat_autoencoder()))
    return TinyPipeline(pipe, {**prompts(1, 10, 40), "guidance_scale": 2.0, **PIXELS})


def bria_fibo() -> TinyPipeline:
    """Bria Fibo: 12 text tokens of which 9 are real; every layer gets text of its own."""
    from diffusers import BriaFiboTransformer2DModel

    transformer = denoiser(
        BriaFiboTransformer2DModel,
        **FLUX_SIZES,
        in_channels=16,
        joint_attention_dim=40,
        axes_dims_rope=list(ROPE_AXES),
        text_encoder_dim=24,
    )
    keep = torch.cat([torch.arange(12).lt(9), torch.ones(ROWS * COLUMNS, dtype=torch.bool)])[None, None, None]

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": text,
            "text_encoder_layers": [text[..., :24]] * LAYERS,
            "timestep": timestep,
            "img_ids": position_ids(),
            "txt_ids": torch.zeros(text.shape[1], 3),
            "joint_attention_kwargs": {"attention_mask": keep},
        }

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 12, 40))


def longcat_image() -> TinyPipeline:
    """LongCat-Image while editing: an image of 8 x 8 tokens behind the image."""
    from diffusers import LongCatImageTransformer2DModel

    transformer = denoiser(
        LongCatImageTransformer2DModel,
        **FLUX_SIZES,
        in_channels=16,
        joint_attention_dim=40,
        pooled_projection_dim=40,
        axes_dims_rope=list(ROPE_AXES),
    )
    offset = torch.tensor([0, 10, 10])
    ids = torch.cat([position_ids(image=1) + offset, position_ids(8, 8, image=2) + offset])
    reference = noise(1, 64, 16, seed=3)

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        text_ids = torch.zeros(text.shape[1], 3)
        text_ids[:, 1:] = torch.arange(text.shape[1]).unsqueeze(1)
        return {
            "hidden_states": torch.cat([latents, reference], 1),
            "encoder_hidden_states": text,
            "timestep": timestep / 1000,
            "img_ids": ids,
            "txt_ids": text_ids,
        }

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 10, 40))


def ovis_image() -> TinyPipeline:
    """Ovis-Image."""
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    transformer = denoiser(
        OvisImageTransformer2DModel, **FLUX_SIZES, in_channels=16, out_channels=16, joint_attention_dim=40, axes_dims_rope=ROPE_AXES
    )
    pipe = OvisImagePipeline(**parts(transformer, flat_autoencoder()))
    return TinyPipeline(pipe, {**prompts(1, 10, 40), "negative_prompt": None, "guidance_scale": 2.0, **PIXELS})


def krea2() -> TinyPipeline:
    """Krea 2: 12 text tokens of which 9 are real, of two layers of the text encoder."""
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    transformer = enlarged_denoiser(
        Krea2Transformer2DModel,
        in_channels=16,
        num_layers=LAYERS,
        **ATTENTION,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=16,
        text_hidden_dim=24,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=ROPE_AXES,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = Krea2Pipeline(**parts(transformer, qwen_autoencoder([1, 1]), scheduler), text_encoder_select_layers=(0, 1))
    text = {**prompts(1, 12, 2, 24), **prompt_masks(9, 4, of=12, name="prompt_embeds_mask"), "guidance_scale": 2.0}
    return TinyPipeline(pipe, {**text, "height": 4 * ROWS, "width": 4 * COLUMNS})


def nucleusmoe_image() -> TinyPipeline:
    """NucleusMoE-Image without its experts: 12 text tokens of which 9 are real, as keys after those of the image."""
    from diffusers import NucleusMoEImageTransformer2DModel

    transformer = enlarged_denoiser(
        NucleusMoEImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=LAYERS,
        **ATTENTION,
        num_key_value_heads=1,
        joint_attention_dim=24,
        axes_dims_rope=ROPE_AXES,
        moe_enabled=False,
    )

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "img_shapes": [(1, ROWS, COLUMNS)],
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": first(9, of=12),
            "timestep": timestep / 1000,
        }

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 12, 24))


def ideogram4() -> TinyPipeline:
    """Ideogram 4: 12 text tokens of which the last 9 are real, then the image; a second transformer sees the image alone."""
    from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel

    class Encoded(Ideogram4Pipeline):
        """Its text encoder is a large one even when tiny."""

        def encode_prompt(self, prompt: str, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> tuple[Tensor, ...]:
            text = noise(1, max_sequence_length + grid_h * grid_w, 24, seed=sum(map(ord, prompt)))
            text[:, :3], text[:, max_sequence_length:] = 0, 0
            return text, *self._prepare_ids([max_sequence_length - 3], grid_h, grid_w, max_sequence_length, device)

    torch.manual_seed(0)
    sizes = {**ATTENTION, "num_layers": LAYERS, "intermediate_size": 48}
    of_text = {"adaln_dim": 16, "llm_features_dim": 24, "mrope_section": (6, 5, 5)}
    transformers = [Ideogram4Transformer2DModel(in_channels=16, **sizes, **of_text) for _ in range(2)]
    for transformer in transformers:
        enlarge_weights(transformer)
    pipe = Encoded(**parts(transformers[0], flux2_autoencoder()), unconditional_transformer=transformers[1])
    guidance = {"guidance_scale": 2.0, "guidance_schedule": None}
    return TinyPipeline(pipe, {"prompt": "a cat", **PIXELS, "max_sequence_length": 12, **guidance})


def qwen_image21(use_cache: bool = True) -> TinyPipeline:
    """Qwen-Image 2.1 with an image of 8 x 8 tokens that is given: 9 text tokens, its tokens, then the image's."""
    from diffusers import QwenImage21Transformer2DModel
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    transformer = enlarged_denoiser(
        QwenImage21Transformer2DModel,
        in_channels=16,
        out_channels=16,
        num_layers=LAYERS,
        **ATTENTION,
        context_in_dim=24,
        axes_dims_rope=ROPE_AXES,
    )
    # in the text encoder's sequence an image has a place for four of its tokens
    places = torch.zeros(1, 9 + 16 + ROWS * COLUMNS // 4, dtype=torch.bool)
    places[:, 5:21], places[:, 25:] = True, True
    given, caches = noise(1, 64, 16, seed=3), {}

    def arguments_of(latents: Tensor, text: Tensor, timestep: Tensor) -> dict[str, Any]:
        is_first = float(timestep[0]) == 1000
        if is_first:
            caches["own"] = QwenImage21KVCache(LAYERS)
        cached = {"kv_cache": caches["own"], "kv_cache_mode": "extract" if is_first else "cached"} if use_cache else {}
        return {
            "hidden_states": torch.cat([given, latents], 1),
            "encoder_hidden_states": text,
            "timestep": timestep / 1000,
            "img_shapes": [[(1, 8, 8), (1, ROWS, COLUMNS)]],
            "img_mask": places,
            **cached,
        }

    return looped_by(transformer, arguments_of, SHAPE, noise(1, 25, 24), image_last=True)
