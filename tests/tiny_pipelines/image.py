"""Image families: 30 x 44 image tokens behind the text, 11 blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiny_pipelines.autoencoders import flat_autoencoder, qwen_autoencoder
from tiny_pipelines.pipeline import ATTENTION, LAYERS, TinyPipeline, denoiser, noise, parts, picture, prompts

# sums to the head size
ROPE_AXES = (8, 12, 12)


def flux() -> TinyPipeline:
    """Flux.1: one double-stream and one single-stream layer."""
    from diffusers import FluxPipeline

    return TinyPipeline(FluxPipeline(**_flux_parts()), _flux_arguments())


def flux_kontext(reference: tuple[int, int] = (16, 16)) -> TinyPipeline:
    """Flux.1 Kontext: a reference image of so many rows and columns of tokens behind the image."""
    from diffusers import FluxKontextPipeline

    pipe = FluxKontextPipeline(**_flux_parts())
    image = noise(1, 4, 2 * reference[0], 2 * reference[1], seed=3)
    return TinyPipeline(pipe, {**_flux_arguments(), "image": image, "max_area": 60 * 88, "_auto_resize": False})


def qwen_image(batch: int = 1) -> TinyPipeline:
    """Qwen-Image: text and image in one joint attention."""
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline(**_qwen_parts(levels=2))
    return TinyPipeline(pipe, {**_qwen_arguments(batch), "height": 240, "width": 352})


def qwen_image_edit() -> TinyPipeline:
    """Qwen-Image Edit: a reference of the output's size behind the image, 32 x 32 tokens each."""
    from diffusers import QwenImageEditPipeline

    pipe = _without_encoding(QwenImageEditPipeline(**_qwen_parts(levels=4), processor=None))
    return TinyPipeline(pipe, {**_qwen_arguments(), "image": picture(32, 32)})


def qwen_image_edit_plus() -> TinyPipeline:
    """Qwen-Image Edit Plus: two references of other shapes (32 x 32 and 16 x 64 tokens) behind an image of 24 x 40 tokens."""
    from diffusers import QwenImageEditPlusPipeline

    pipe = _without_encoding(QwenImageEditPlusPipeline(**_qwen_parts(levels=4), processor=None))
    return TinyPipeline(pipe, {**_qwen_arguments(), "image": [picture(32, 32), picture(16, 64)], "height": 24 * 32, "width": 40 * 32})


class _Layered(TinyPipeline):
    """Returns the latents of the layers by way of the pipeline's images: asked for latents, it fails."""

    def run(self, num_steps: int = 3, **overrides: Any) -> Tensor:
        (latents,) = super().run(num_steps, **{"output_type": "pt", **overrides})
        return latents


def qwen_image_layered() -> TinyPipeline:
    """Qwen-Image Layered: the whole picture, a layer, and the given picture behind them, 40 x 40 tokens each."""
    from diffusers import QwenImageLayeredPipeline

    made = _qwen_parts(levels=3, use_additional_t_cond=True, use_layer3d_rope=True)
    encoder = nn.Linear(1, 1)
    # all that the pipeline asks of it
    encoder.device, encoder.dtype = torch.device("cpu"), torch.float32
    made |= {"text_encoder": encoder, "scheduler": type(made["scheduler"])(use_dynamic_shifting=True)}
    pipe = _without_encoding(QwenImageLayeredPipeline(**made, processor=None))
    pipe.vae.decode = lambda latents, return_dict: (latents,)
    pipe.image_processor.postprocess = lambda image, output_type: image
    # three channels, since it takes four for latents of this VAE; it takes the words to spare itself a caption, and then the embeddings
    return _Layered(pipe, {**_qwen_arguments(), "prompt": "a", "image": picture(32, 32), "layers": 1, "resolution": 640})


def _without_encoding(pipe: Any) -> Any:
    """Its references are noise: the pipelines make them a million pixels large, which takes a VAE a minute on a CPU."""
    scale = pipe.vae_scale_factor
    pipe._encode_vae_image = lambda image, generator: noise(len(image), 4, 1, image.shape[3] // scale, image.shape[4] // scale, seed=4)
    return pipe


def _qwen_parts(levels: int, **transformer: Any) -> dict[str, Any]:
    """Of any of its pipelines; the VAE halves the size `levels` times."""
    from diffusers import QwenImageTransformer2DModel

    model = denoiser(
        QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=LAYERS,
        **ATTENTION,
        joint_attention_dim=20,
        axes_dims_rope=ROPE_AXES,
        **transformer,
    )
    return parts(model, qwen_autoencoder([1] * levels + [2]))


def _qwen_arguments(batch: int = 1) -> dict[str, Any]:
    mask = torch.ones(batch, 7, dtype=torch.long)
    return {
        **prompts(batch, 7, 20),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds_mask": mask.clone(),
        "true_cfg_scale": 2.0,
    }


def flux_with_hidden_image_tokens() -> TinyPipeline:
    """Flux.1 whose attention gets a mask that hides a token in the middle of the image."""
    tiny = flux()
    mask = torch.ones(1, 1, 1, 10 + 30 * 44, dtype=torch.bool)
    mask[..., 500] = False
    tiny.arguments["joint_attention_kwargs"] = {"attention_mask": mask}
    return tiny


def _flux_parts() -> dict[str, Any]:
    from diffusers import FluxTransformer2DModel

    transformer = denoiser(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=LAYERS - 1,
        **ATTENTION,
        joint_attention_dim=40,
        pooled_projection_dim=20,
        axes_dims_rope=ROPE_AXES,
        guidance_embeds=True,
    )
    return parts(transformer, flat_autoencoder(), encoders=2)


def _flux_arguments() -> dict[str, Any]:
    return {
        **prompts(1, 10, 40),
        "pooled_prompt_embeds": noise(1, 20),
        "negative_pooled_prompt_embeds": noise(1, 20, seed=2),
        "true_cfg_scale": 2.0,
        "height": 60,
        "width": 88,
    }
