"""ConsisID: CogVideoX whose layers also see a face, through cross-attention of its own that has no processor."""

from __future__ import annotations

from ditattn.models.base import ModelFamily
from ditattn.models.cogvideox import frame_rate, layout

__all__ = ["CONSISID"]

CONSISID = ModelFamily(
    name="ConsisID",
    transformer_classes=("ConsisIDTransformer3DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    frame_rate=frame_rate,
    dispatches=False,
    notes="text before video, protected; served as CogVideoX is",
)
