"""Tiny random models of ComfyUI's own classes."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.supported_models
import torch

JOINT = {
    "vec_in_dim": 16,
    "context_in_dim": 32,
    "hidden_size": 128,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [16, 24, 24],
    "qkv_bias": True,
    "guidance_embed": True,
}
# ComfyUI's name of the configuration, of the diffusion model, and shape of the latents; 1280 tokens or more each
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "Wan": (
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 128,
            "ffn_dim": 64,
            "freq_dim": 64,
            "text_dim": 32,
            "num_heads": 2,
            "num_layers": 2,
        },
        (1, 16, 5, 32, 32),
    ),
    "HunyuanVideo": (
        "HunyuanVideo",
        {
            "image_model": "hunyuan_video",
            **JOINT,
            "in_channels": 16,
            "out_channels": 16,
            "theta": 256,
            "patch_size": [1, 2, 2],
            "byt5": False,
            "meanflow": False,
        },
        (1, 16, 5, 32, 32),
    ),
    "Flux": (
        "Flux",
        {"image_model": "flux", **JOINT, "in_channels": 16, "out_channels": 16, "theta": 10000, "patch_size": 2},
        (1, 16, 80, 64),
    ),
    "Qwen-Image": (
        "QwenImage",
        {
            "image_model": "qwen_image",
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "joint_attention_dim": 32,
            "axes_dims_rope": (16, 24, 24),
        },
        (1, 16, 1, 80, 64),
    ),
    "LTX-Video": (
        "LTXV",
        {
            "image_model": "ltxv",
            "cross_attention_dim": 128,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "caption_channels": 32,
            "num_layers": 2,
        },
        (1, 128, 5, 16, 16),
    ),
}


# relatives of Wan: control blocks beside the video's, conditions among the channels, a reference image before the video
RELATIVES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "VACE": ("WAN21_Vace", {**FAMILIES["Wan"][1], "model_type": "vace", "vace_layers": 2, "vace_in_dim": 96}, (1, 16, 5, 32, 32)),
    "camera": ("WAN21_Camera", {**FAMILIES["Wan"][1], "model_type": "camera", "in_dim": 32}, (1, 16, 5, 32, 32)),
    "reference": (
        "WAN21_FunControl2V",
        {**FAMILIES["Wan"][1], "model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
        (1, 16, 5, 32, 32),
    ),
}


def patcher(name: str) -> Any:
    config_name, unet, _ = (FAMILIES | RELATIVES)[name]
    config = getattr(comfy.supported_models, config_name)({**unet, "dtype": torch.float32})
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
