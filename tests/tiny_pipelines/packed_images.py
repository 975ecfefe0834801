"""Image families whose tokens are packed and told by their positions, as in Flux: 30 x 44 image tokens, 11 blocks with the text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tiny_pipelines.pipeline import HEAD_SIZE, HEADS, LAYERS, TinyPipeline, noise
from tiny_pipelines.transformer_loop import looped

ROWS, COLUMNS = 30, 44
# sums to the head size
ROPE_AXES = (8, 12, 12)
SIZES: dict[str, Any] = {"num_layers": 1, "num_single_layers": LAYERS - 1, "attention_head_dim": HEAD_SIZE, "num_attention_heads": HEADS}


def vae() -> AutoencoderKL:
    """One that makes one latent of a pixel."""
    return AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8,),
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def position_ids(rows: int = ROWS, columns: int = COLUMNS, image: int = 0, width: int = 3) -> Tensor:
    """(S, width): number of the image, row, column, zeros."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    ids = torch.zeros(rows * columns, width)
    ids[:, 0], ids[:, 1:3] = image, grid
    return ids


def flux2() -> TinyPipeline:
    """Flux 2: one double-stream and one single-stream layer."""
    from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        **SIZES, in_channels=16, joint_attention_dim=40, timestep_guidance_channels=16, axes_dims_rope=(8, 8, 8, 8)
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (8,)}
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer, "text_encoder": None, "tokenizer": None}
    pipe = Flux2Pipeline(**parts, vae=AutoencoderKLFlux2(**blocks, latent_channels=4, norm_num_groups=2))
    return TinyPipeline(pipe, {"prompt_embeds": noise(1, 10, 40), "height": 2 * ROWS, "width": 2 * COLUMNS})


def flux3() -> TinyPipeline:
    """Flux 3 with a reference image of 8 x 8 tokens: a layer of the image alone, then a joint one."""
    from diffusers import Flux3Transformer2DModel

    torch.manual_seed(0)
    transformer = Flux3Transformer2DModel(
        **SIZES, in_channels=16, cond_in_channels=16, joint_attention_dim=40, timestep_channels=16, axes_dims_rope=(8, 8, 8, 8)
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

    return looped(transformer, arguments_of, (1, ROWS * COLUMNS, 16), noise(1, 10, 40))


def chroma() -> TinyPipeline:
    """Chroma: 12 text tokens of which 9 are real, so that a mask hides tokens before the image."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        **SIZES,
        in_channels=16,
        joint_attention_dim=40,
        axes_dims_rope=ROPE_AXES,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer, "text_encoder": None, "tokenizer": None}
    text = {
        "prompt_embeds": noise(1, 12, 40),
        "prompt_attention_mask": torch.arange(12).lt(9).unsqueeze(0),
        "negative_prompt_embeds": noise(1, 12, 40, seed=2),
        "negative_prompt_attention_mask": torch.arange(12).lt(4).unsqueeze(0),
        "guidance_scale": 2.0,
    }
    return TinyPipeline(ChromaPipeline(**parts, vae=vae()), {**text, "height": 2 * ROWS, "width": 2 * COLUMNS})


def bria() -> TinyPipeline:
    """Bria 3.2."""
    from diffusers import BriaPipeline, BriaTransformer2DModel

    torch.manual_seed(0)
    transformer = BriaTransformer2DModel(**SIZES, in_channels=16, joint_attention_dim=40, axes_dims_rope=list(ROPE_AXES))
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer, "text_encoder": None, "tokenizer": None}
    text = {"prompt_embeds": noise(1, 10, 40), "negative_prompt_embeds": noise(1, 10, 40, seed=2), "guidance_scale": 2.0}
    return TinyPipeline(BriaPipeline(**parts, vae=vae()), {**text, "height": 2 * ROWS, "width": 2 * COLUMNS})


def bria_fibo() -> TinyPipeline:
    """Bria Fibo: 12 text tokens of which 9 are real; every layer gets text of its own."""
    from diffusers import BriaFiboTransformer2DModel

    torch.manual_seed(0)
    transformer = BriaFiboTransformer2DModel(
        **SIZES, in_channels=16, joint_attention_dim=40, axes_dims_rope=list(ROPE_AXES), text_encoder_dim=24
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

    return looped(transformer, arguments_of, (1, ROWS * COLUMNS, 16), noise(1, 12, 40))


def longcat_image() -> TinyPipeline:
    """LongCat-Image while editing: an image of 8 x 8 tokens behind the image."""
    from diffusers import LongCatImageTransformer2DModel

    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        **SIZES, in_channels=16, joint_attention_dim=40, pooled_projection_dim=40, axes_dims_rope=list(ROPE_AXES)
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

    return looped(transformer, arguments_of, (1, ROWS * COLUMNS, 16), noise(1, 10, 40))


def ovis_image() -> TinyPipeline:
    """Ovis-Image."""
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel

    torch.manual_seed(0)
    transformer = OvisImageTransformer2DModel(**SIZES, in_channels=16, out_channels=16, joint_attention_dim=40, axes_dims_rope=ROPE_AXES)
    parts = {"scheduler": FlowMatchEulerDiscreteScheduler(), "transformer": transformer, "text_encoder": None, "tokenizer": None}
    negative = {"negative_prompt": None, "negative_prompt_embeds": noise(1, 10, 40, seed=2)}
    text = {"prompt_embeds": noise(1, 10, 40), **negative, "guidance_scale": 2.0}
    return TinyPipeline(OvisImagePipeline(**parts, vae=vae()), {**text, "height": 2 * ROWS, "width": 2 * COLUMNS})
