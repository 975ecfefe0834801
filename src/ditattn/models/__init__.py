"""Facts about DiT families: one file each, data only."""

from __future__ import annotations

from ditattn.models.cogvideox import COGVIDEOX
from ditattn.models.flux import FLUX
from ditattn.models.hunyuan_video import HUNYUAN_VIDEO
from ditattn.models.interface import ModelFamily, TokenLayout
from ditattn.models.ltx_video import LTX_VIDEO
from ditattn.models.qwen_image import QWEN_IMAGE
from ditattn.models.wan import WAN

__all__ = ["MODELS", "ModelFamily", "TokenLayout", "find_family"]

MODELS: tuple[ModelFamily, ...] = (WAN, HUNYUAN_VIDEO, FLUX, QWEN_IMAGE, LTX_VIDEO, COGVIDEOX)


def find_family(transformer_class: str) -> ModelFamily | None:
    """The family of a diffusers transformer class, or None."""
    return next((family for family in MODELS if transformer_class in family.transformer_classes), None)
