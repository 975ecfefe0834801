"""Wan: 5 x 14 x 20 tokens, 11 blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tiny_pipelines.pipeline import HEAD_SIZE, HEADS, LAYERS, TinyPipeline, noise
from tiny_pipelines.text import TEXT_DIM, text_encoder, tokenizer

IMAGE_DIM = 20
SIZE = {"height": 224, "width": 320, "num_frames": 17}


def transformer(seed: int = 0, **changes: Any) -> Any:
    """A Wan denoiser of two layers."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": HEAD_SIZE,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
        "freq_dim": 64,
        "ffn_dim": 40,
        "num_layers": LAYERS,
        "rope_max_seq_len": 64,
    }
    return WanTransformer3DModel(**{**settings, **changes})


def wan(**changes: Any) -> TinyPipeline:
    """Wan 2.1, text to video. `changes` replace components of the pipeline."""
    from diffusers import WanPipeline

    parts = {"transformer": transformer(), **_shared_parts(), **changes}
    return TinyPipeline(WanPipeline(**parts), {"prompt": "a cat", "negative_prompt": "bad", "max_sequence_length": 16, **SIZE})


def wan_two_transformers() -> TinyPipeline:
    """Wan 2.2: a denoiser for the noisy steps, another one for the rest."""
    return wan(transformer_2=transformer(1), boundary_ratio=0.875)


def wan_image_to_video() -> TinyPipeline:
    """Wan 2.1, image to video: cross-attention to image tokens beside the text. 13 x 10 x 10 tokens, 11 blocks."""
    from diffusers import WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    parts = {"transformer": transformer(in_channels=36, image_dim=IMAGE_DIM, added_kv_proj_dim=HEADS * HEAD_SIZE), **_shared_parts()}
    pixels = {"height": 32, "width": 32}
    vision = CLIPVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=pixels["height"], patch_size=16
    )
    pipe = WanImageToVideoPipeline(
        **parts, image_encoder=CLIPVisionModel(vision), image_processor=CLIPImageProcessor(size=pixels, crop_size=pixels)
    )
    # the VAE encodes every frame of the condition: fewer pixels and more frames than elsewhere, and only once, as the image stays the same
    size = {"height": 160, "width": 160, "num_frames": 49}
    pipe.vae.encode = _only_once(pipe.vae.encode)
    # the processor takes everything before the last 512 tokens for the image
    return TinyPipeline(pipe, {"prompt": "a cat", "negative_prompt": "bad", "max_sequence_length": 512, "image": _image(size), **size})


def wan_with_token_timesteps() -> TinyPipeline:
    """Wan 2.2 TI2V: a timestep per token, 0 for those of the given image."""
    from diffusers import WanImageToVideoPipeline

    pipe = WanImageToVideoPipeline(
        transformer=transformer(), **_shared_parts(), image_encoder=None, image_processor=None, transformer_2=None, expand_timesteps=True
    )
    return TinyPipeline(pipe, {"prompt": "a cat", "negative_prompt": "bad", "max_sequence_length": 16, "image": _image(SIZE), **SIZE})


def _shared_parts() -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

    torch.manual_seed(0)
    return {
        "vae": AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
    }


def _only_once(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    results: list[Any] = []

    def call(argument: Any) -> Any:
        if not results:
            results.append(function(argument))
        return results[0]

    return call


def _image(size: dict[str, int]) -> Any:
    from PIL import Image

    pixels = (noise(size["height"], size["width"], 3) * 40 + 128).clamp(0, 255).byte()
    return Image.fromarray(pixels.numpy())
