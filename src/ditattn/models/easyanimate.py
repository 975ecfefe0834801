"""EasyAnimate: text tokens, then video tokens, in one joint attention that calls torch's SDPA directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, patch_triple, text_length

__all__ = ["EASYANIMATE"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, T, H, W)`; the text of a second encoder, if there is one, follows that of the first."""
    second = arguments.get("encoder_hidden_states_t5")
    before = text_length(arguments) + (0 if second is None else int(second.shape[1]))
    return TokenLayout(tuple(arguments["hidden_states"].shape), patch_triple(config), num_prefix_tokens=before)


def frame_rate(pipeline_config: Any) -> int:
    """What its pipelines' examples play at."""
    return 8


EASYANIMATE = ModelFamily(
    name="EasyAnimate",
    transformer_classes=("EasyAnimateTransformer3DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    frame_rate=frame_rate,
    size_multiple=16,
    dispatches=False,
    notes="text before video, protected; text, control and inpainting; redirected as CogVideoX is",
)
