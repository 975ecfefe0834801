"""Facts about DiT families: one file each, data only. Hosts ask here and name no family."""

from __future__ import annotations

from typing import Any

from ditattn.models.base import DEFAULT_FRAME_RATE, ModelFamily, TokenLayout
from ditattn.models.cogvideox import COGVIDEOX
from ditattn.models.flux import FLUX
from ditattn.models.hunyuan_video import HUNYUAN_VIDEO
from ditattn.models.ltx_video import LTX_VIDEO
from ditattn.models.qwen_image import QWEN_IMAGE
from ditattn.models.wan import WAN

__all__ = [
    "DEFAULT_FRAME_RATE",
    "MODELS",
    "OTHER_FRAME_RATES",
    "ModelFamily",
    "TokenLayout",
    "family_of",
    "find_family",
    "needs_full_precision",
    "unwrapped",
]

MODELS: tuple[ModelFamily, ...] = (WAN, HUNYUAN_VIDEO, FLUX, QWEN_IMAGE, LTX_VIDEO, COGVIDEOX)

OTHER_FRAME_RATES = {"MochiTransformer3DModel": 30}
"""Frames per second of models that no backend serves: `ditattn generate` makes their videos all the same."""


def find_family(transformer_class: str) -> ModelFamily | None:
    """The family of a diffusers transformer class, or None."""
    return next((family for family in MODELS if transformer_class in family.transformer_classes), None)


def unwrapped(module: Any) -> Any:
    """The module behind torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def family_of(module: Any) -> ModelFamily | None:
    """The family of a transformer, compiled or not; None if it is of no known one."""
    return find_family(type(unwrapped(module)).__name__)


def needs_full_precision(vae_class: str) -> bool:
    """True for VAEs that some family keeps in float32, whichever pipeline they come with."""
    return any(vae_class in family.full_precision_vaes for family in MODELS)
