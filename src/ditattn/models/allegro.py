"""Allegro: video tokens only in self-attention (`attn1`), which calls torch's SDPA directly; text is separate cross-attention."""

from __future__ import annotations

from typing import Any

from ditattn.models.base import ModelFamily, video_only

__all__ = ["ALLEGRO"]


def frame_rate(pipeline_config: Any) -> int:
    """What its pipeline's example plays at."""
    return 15


ALLEGRO = ModelFamily(
    name="Allegro",
    transformer_classes=("AllegroTransformer3DModel",),
    layout=video_only,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    frame_rate=frame_rate,
    dispatches=False,
    notes="redirected as CogVideoX is",
)
