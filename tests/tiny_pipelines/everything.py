"""Imports what the pipelines are made of: for a process from which others are forked."""

from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FluxKontextPipeline,
    FluxPipeline,
    LTXPipeline,
    QwenImagePipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
    "FluxKontextPipeline",
    "FluxPipeline",
    "LTXPipeline",
    "QwenImagePipeline",
    "UniPCMultistepScheduler",
    "WanPipeline",
]
