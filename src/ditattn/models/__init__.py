"""Facts about DiT families: one file each, data only. Hosts ask here and name no family."""

from __future__ import annotations

from typing import Any

from ditattn.models.allegro import ALLEGRO
from ditattn.models.anyflow import ANYFLOW
from ditattn.models.aura_flow import AURA_FLOW
from ditattn.models.base import DEFAULT_FRAME_RATE, ModelFamily, TokenLayout
from ditattn.models.bria import BRIA
from ditattn.models.chroma import CHROMA
from ditattn.models.chronoedit import CHRONOEDIT
from ditattn.models.cogvideox import COGVIDEOX
from ditattn.models.cogview4 import COGVIEW4
from ditattn.models.consisid import CONSISID
from ditattn.models.cosmos import COSMOS
from ditattn.models.easyanimate import EASYANIMATE
from ditattn.models.ernie_image import ERNIE_IMAGE
from ditattn.models.flux import FLUX
from ditattn.models.flux2 import FLUX2
from ditattn.models.flux3 import FLUX3
from ditattn.models.glm_image import GLM_IMAGE
from ditattn.models.helios import HELIOS
from ditattn.models.hidream_image import HIDREAM_IMAGE
from ditattn.models.hunyuan_dit import HUNYUAN_DIT
from ditattn.models.hunyuan_image import HUNYUAN_IMAGE
from ditattn.models.hunyuan_video import HUNYUAN_VIDEO
from ditattn.models.hunyuan_video15 import HUNYUAN_VIDEO_15
from ditattn.models.hunyuan_video_framepack import HUNYUAN_VIDEO_FRAMEPACK
from ditattn.models.ideogram4 import IDEOGRAM4
from ditattn.models.joyimage import JOYIMAGE
from ditattn.models.kandinsky5 import KANDINSKY5
from ditattn.models.kandinsky6 import KANDINSKY6
from ditattn.models.krea2 import KREA2
from ditattn.models.longcat_image import LONGCAT_IMAGE
from ditattn.models.ltx2 import LTX2
from ditattn.models.ltx_video import LTX_VIDEO
from ditattn.models.lumina2 import LUMINA2
from ditattn.models.lumina_next import LUMINA_NEXT
from ditattn.models.minimax_h3 import MINIMAX_H3
from ditattn.models.mochi import MOCHI
from ditattn.models.motif_video import MOTIF_VIDEO
from ditattn.models.not_served import NOT_SERVED
from ditattn.models.nucleusmoe_image import NUCLEUSMOE_IMAGE
from ditattn.models.ovis_image import OVIS_IMAGE
from ditattn.models.pixart import PIXART
from ditattn.models.prx import PRX
from ditattn.models.qwen_image import QWEN_IMAGE
from ditattn.models.qwen_image21 import QWEN_IMAGE21
from ditattn.models.skyreels_v2 import SKYREELS_V2
from ditattn.models.stable_diffusion_3 import STABLE_DIFFUSION_3
from ditattn.models.wan import WAN
from ditattn.models.wan_animate import WAN_ANIMATE
from ditattn.models.wan_vace import WAN_VACE
from ditattn.models.z_image import Z_IMAGE

__all__ = [
    "DEFAULT_FRAME_RATE",
    "IMAGE_MODELS",
    "MODELS",
    "NOT_SERVED",
    "ModelFamily",
    "TokenLayout",
    "family_of",
    "find_family",
    "known_class",
    "needs_full_precision",
    "unwrapped",
    "why_not_served",
]

IMAGE_MODELS: tuple[ModelFamily, ...] = (
    FLUX2,
    FLUX3,
    CHROMA,
    BRIA,
    LONGCAT_IMAGE,
    OVIS_IMAGE,
    STABLE_DIFFUSION_3,
    HUNYUAN_IMAGE,
    AURA_FLOW,
    COGVIEW4,
    Z_IMAGE,
    KREA2,
    LUMINA2,
    HIDREAM_IMAGE,
    ERNIE_IMAGE,
    GLM_IMAGE,
    JOYIMAGE,
    PIXART,
    PRX,
    NUCLEUSMOE_IMAGE,
    QWEN_IMAGE21,
    HUNYUAN_DIT,
    LUMINA_NEXT,
    IDEOGRAM4,
)
"""Families of images, beside Flux.1 and Qwen-Image."""

MODELS: tuple[ModelFamily, ...] = (
    WAN,
    HUNYUAN_VIDEO,
    FLUX,
    QWEN_IMAGE,
    LTX_VIDEO,
    COGVIDEOX,
    WAN_VACE,
    WAN_ANIMATE,
    SKYREELS_V2,
    CHRONOEDIT,
    ANYFLOW,
    HUNYUAN_VIDEO_15,
    HUNYUAN_VIDEO_FRAMEPACK,
    LTX2,
    COSMOS,
    KANDINSKY5,
    MOCHI,
    MOTIF_VIDEO,
    HELIOS,
    ALLEGRO,
    EASYANIMATE,
    CONSISID,
    KANDINSKY6,
    MINIMAX_H3,
    *IMAGE_MODELS,
)


def find_family(transformer_class: str) -> ModelFamily | None:
    """The family of a diffusers transformer class, or None."""
    return next((family for family in MODELS if transformer_class in family.transformer_classes), None)


def unwrapped(module: Any) -> Any:
    """The module behind torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def known_class(module: Any) -> str | None:
    """The transformer class by which a module is known: its own, or the nearest known base class; None if it is of no family."""
    return next((cls.__name__ for cls in type(unwrapped(module)).__mro__ if find_family(cls.__name__) is not None), None)


def family_of(module: Any) -> ModelFamily | None:
    """The family of a transformer, compiled or not, also of a subclass of a known one; None if it is of no known one."""
    name = known_class(module)
    return None if name is None else find_family(name)


def why_not_served(module: Any) -> str | None:
    """Why a transformer of no family is not served, where that is known of its class or of the nearest base class; else None."""
    return next((NOT_SERVED[cls.__name__] for cls in type(unwrapped(module)).__mro__ if cls.__name__ in NOT_SERVED), None)


def needs_full_precision(vae_class: str) -> bool:
    """True for VAEs that some family keeps in float32, whichever pipeline they come with."""
    return any(vae_class in family.full_precision_vaes for family in MODELS)
