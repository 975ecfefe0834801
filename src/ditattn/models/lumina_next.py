"""Lumina-Next: image tokens only in self-attention (`attn1`), which calls torch's SDPA directly; text is separate cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditattn.models.base import ModelFamily, TokenLayout, image_layout, rising

__all__ = ["LUMINA_NEXT"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, H, W)`."""
    return image_layout(config.patch_size, arguments)


def key_mask(config: Any, arguments: Mapping[str, Any]) -> Tensor:
    """The layers make a square mask of ones: every token is real."""
    latents = arguments["hidden_states"]
    return torch.ones(latents.shape[0], layout(config, arguments).num_tokens, dtype=torch.bool, device=latents.device)


def head_size(config: Any) -> int:
    return int(config.hidden_size) // int(config.num_attention_heads)


LUMINA_NEXT = ModelFamily(
    name="Lumina-Next",
    transformer_classes=("LuminaNextDiT2DModel",),
    layout=layout,
    time=rising("timestep"),
    self_attention=r"layers\.\d+\.attn1",
    key_mask=key_mask,
    head_size=head_size,
    size_multiple=16,
    dispatches=False,
    notes="SDPA calls are redirected; heads of 72 are padded by kernels",
)
