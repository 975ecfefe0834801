"""Cosmos 1, 2 and 2.5: video tokens only in self-attention (`attn1`), whose processors name no backend to diffusers' dispatcher."""

from __future__ import annotations

from typing import Any

from ditattn.models.base import ModelFamily, video_only

__all__ = ["COSMOS"]

FIRST_GENERATION = ("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline")


def frame_rate(pipeline_config: Any) -> int:
    """The default of the pipelines' `fps`."""
    return 30 if pipeline_config.get("_class_name") in FIRST_GENERATION else 16


COSMOS = ModelFamily(
    name="Cosmos 1, 2, 2.5",
    transformer_classes=("CosmosTransformer3DModel",),
    layout=video_only,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    frame_rate=frame_rate,
    size_multiple=16,
    dispatches=False,
    notes="text to image and video, video to world; its processors choose no backend, so their SDPA calls are redirected",
)
