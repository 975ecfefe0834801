"""Wan and the models made of its blocks: 5 x 14 x 20 tokens, 11 blocks, except where the text says otherwise."""

from __future__ import annotations

from typing import Any

import torch

from tiny_pipelines.pipeline import HEAD_SIZE, HEADS, LAYERS, TinyPipeline, noise
from tiny_pipelines.text import TEXT_DIM, text_encoder, tokenizer

IMAGE_DIM = 20
SIZE = {"height": 224, "width": 320, "num_frames": 17}
# where the VAE encodes every frame of a condition: fewer pixels and more frames
LONG_SIZE = {"height": 160, "width": 160, "num_frames": 49}
TEXT: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "bad", "max_sequence_length": 16}


def transformer(seed: int = 0, **changes: Any) -> Any:
    """A Wan denoiser of two layers."""
    return _transformer("WanTransformer3DModel", seed, **changes)


def wan(**changes: Any) -> TinyPipeline:
    """Wan 2.1, text to video. `changes` replace components of the pipeline."""
    from diffusers import WanPipeline

    parts = {"transformer": transformer(), **_shared_parts(), **changes}
    return TinyPipeline(WanPipeline(**parts), {**TEXT, **SIZE})


def wan_two_transformers() -> TinyPipeline:
    """Wan 2.2: a denoiser for the noisy steps, another one for the rest."""
    return wan(transformer_2=transformer(1), boundary_ratio=0.875)


def wan_image_to_video() -> TinyPipeline:
    """Wan 2.1, image to video: cross-attention to image tokens beside the text. 13 x 10 x 10 tokens, 11 blocks."""
    from diffusers import WanImageToVideoPipeline

    parts = {"transformer": transformer(in_channels=36, image_dim=IMAGE_DIM, added_kv_proj_dim=HEADS * HEAD_SIZE), **_shared_parts()}
    pipe = WanImageToVideoPipeline(**parts, **_image_encoder())
    # the processor takes everything before the last 512 tokens for the image
    return TinyPipeline(pipe, {**TEXT, "max_sequence_length": 512, "image": _image(LONG_SIZE), **LONG_SIZE})


def wan_with_token_timesteps() -> TinyPipeline:
    """Wan 2.2 TI2V: a timestep per token, 0 for those of the given image."""
    from diffusers import WanImageToVideoPipeline

    pipe = WanImageToVideoPipeline(
        transformer=transformer(), **_shared_parts(), image_encoder=None, image_processor=None, transformer_2=None, expand_timesteps=True
    )
    return TinyPipeline(pipe, {**TEXT, "image": _image(SIZE), **SIZE})


def lucy_edit() -> TinyPipeline:
    """Lucy Edit: Wan with the edited video's latents in further channels. 13 x 10 x 10 tokens, 11 blocks."""
    from diffusers import LucyEditPipeline

    pipe = LucyEditPipeline(transformer=transformer(in_channels=32), **_shared_parts())
    video = [_image(LONG_SIZE)] * LONG_SIZE["num_frames"]
    return TinyPipeline(pipe, {**TEXT, "video": video, **LONG_SIZE})


def wan_vace() -> TinyPipeline:
    """Wan VACE: one layer and one of the control branch. 13 x 10 x 10 tokens, 11 blocks."""
    from diffusers import WanVACEPipeline

    denoiser = _transformer("WanVACETransformer3DModel", num_layers=1, vace_layers=[0], vace_in_channels=96)
    pipe = WanVACEPipeline(transformer=denoiser, **_shared_parts())
    return TinyPipeline(pipe, {**TEXT, **LONG_SIZE})


def skyreels_v2() -> TinyPipeline:
    """SkyReels V2, text to video."""
    from diffusers import SkyReelsV2Pipeline

    pipe = SkyReelsV2Pipeline(transformer=_transformer("SkyReelsV2Transformer3DModel"), **_shared_parts())
    return TinyPipeline(pipe, {**TEXT, **SIZE})


def skyreels_v2_diffusion_forcing() -> TinyPipeline:
    """SkyReels V2 with a timestep for each frame and a copy of the scheduler for each frame."""
    from diffusers import SkyReelsV2DiffusionForcingPipeline

    denoiser = _transformer("SkyReelsV2Transformer3DModel", inject_sample_info=True)
    return TinyPipeline(SkyReelsV2DiffusionForcingPipeline(transformer=denoiser, **_shared_parts()), {**TEXT, **SIZE})


def chronoedit() -> TinyPipeline:
    """ChronoEdit with temporal reasoning, without which there are two frames. 13 x 10 x 10 tokens, 11 blocks."""
    from diffusers import ChronoEditPipeline

    denoiser = _transformer(
        "ChronoEditTransformer3DModel", in_channels=36, image_dim=IMAGE_DIM, added_kv_proj_dim=HEADS * HEAD_SIZE, rope_temporal_skip_len=13
    )
    pipe = ChronoEditPipeline(transformer=denoiser, **_shared_parts(), **_image_encoder())
    reasoning = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 1000}
    return TinyPipeline(pipe, {**TEXT, "max_sequence_length": 512, "image": _image(LONG_SIZE), **reasoning, **LONG_SIZE})


def wan_animate() -> TinyPipeline:
    """Wan Animate: a reference frame and 13 frames of 10 x 10 tokens, 11 blocks."""
    from diffusers import WanAnimatePipeline

    denoiser = _transformer(
        "WanAnimateTransformer3DModel",
        in_channels=36,
        latent_channels=16,
        image_dim=IMAGE_DIM,
        added_kv_proj_dim=HEADS * HEAD_SIZE,
        motion_encoder_size=16,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    pipe = WanAnimatePipeline(transformer=denoiser, **_shared_parts(), **_image_encoder())
    # pixels are for a second segment, which such a short video has not
    pipe.vae.decode = lambda latents, return_dict: (latents,)
    frames = LONG_SIZE["num_frames"]
    videos = {"pose_video": [_image(LONG_SIZE)] * frames, "face_video": [_image({"height": 16, "width": 16})] * frames}
    size = {"height": LONG_SIZE["height"], "width": LONG_SIZE["width"], "segment_frame_length": frames}
    arguments = {**TEXT, "max_sequence_length": 512, "guidance_scale": 2.0, "image": _image(LONG_SIZE)}
    return TinyPipeline(pipe, {**arguments, **videos, **size})


def anyflow() -> TinyPipeline:
    """AnyFlow: a few-step model with two timesteps; both CFG branches in one batch."""
    from diffusers import AnyFlowPipeline, FlowMapEulerDiscreteScheduler

    parts = {**_shared_parts(), "scheduler": FlowMapEulerDiscreteScheduler()}
    pipe = AnyFlowPipeline(transformer=_transformer("AnyFlowTransformer3DModel"), **parts)
    return TinyPipeline(pipe, {**TEXT, "guidance_scale": 2.0, **SIZE})


def _transformer(name: str, seed: int = 0, **changes: Any) -> Any:
    """A denoiser of two layers, of a diffusers class that is built as Wan's is."""
    import diffusers

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
    return getattr(diffusers, name)(**{**settings, **changes})


def _image_encoder() -> dict[str, Any]:
    """CLIP with one layer, and its processor."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    pixels = {"height": 32, "width": 32}
    vision = CLIPVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=pixels["height"], patch_size=16
    )
    return {"image_encoder": CLIPVisionModel(vision), "image_processor": CLIPImageProcessor(size=pixels, crop_size=pixels)}


def _shared_parts() -> dict[str, Any]:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=2, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
    return {
        "vae": _encoding_once(vae),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
    }


def _encoding_once(vae: Any) -> Any:
    """The same VAE, which encodes no condition a second time that any of this process has encoded: all have the same weights."""
    encode = vae.encode

    def encode_once(pixels: torch.Tensor, **options: Any) -> Any:
        key = (pixels.shape, pixels.dtype, hash(pixels.contiguous().view(torch.uint8).numpy().tobytes()), *options.items())
        if key not in _ENCODED:
            if len(_ENCODED) == MOST_CONDITIONS:
                _ENCODED.clear()
            _ENCODED[key] = encode(pixels, **options)
        return _ENCODED[key]

    vae.encode = encode_once
    return vae


# more than the pipelines here have; of 16 x 13 x 20 x 20 latents each
MOST_CONDITIONS = 32
_ENCODED: dict[tuple[Any, ...], Any] = {}


def _image(size: dict[str, int]) -> Any:
    from PIL import Image

    pixels = (noise(size["height"], size["width"], 3) * 40 + 128).clamp(0, 255).byte()
    return Image.fromarray(pixels.numpy())
