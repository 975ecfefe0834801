"""Imports what the pipelines are made of: for a process from which others are forked."""

from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChronoEditPipeline,
    CogVideoXPipeline,
    Flux2Pipeline,
    FluxKontextPipeline,
    FluxPipeline,
    HunyuanVideoPipeline,
    LTXConditionPipeline,
    LTXPipeline,
    QwenImageEditPipeline,
    QwenImagePipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLLTXVideo",
    "AutoencoderKLQwenImage",
    "AutoencoderKLWan",
    "ChronoEditPipeline",
    "CogVideoXPipeline",
    "Flux2Pipeline",
    "FluxKontextPipeline",
    "FluxPipeline",
    "HunyuanVideoPipeline",
    "LTXConditionPipeline",
    "LTXPipeline",
    "QwenImageEditPipeline",
    "QwenImagePipeline",
    "UniPCMultistepScheduler",
    "WanPipeline",
]
