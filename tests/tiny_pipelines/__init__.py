"""Tiny random-weight pipelines of every family: built in the test, nothing downloaded, a second or less each.

Head size 32, and 10 to 12 blocks of 128 tokens: the least at which both sparse backends drop something.
"""

from __future__ import annotations

from collections.abc import Callable

from tiny_pipelines.image import (
    flux,
    flux_kontext,
    flux_with_hidden_image_tokens,
    qwen_image,
    qwen_image_edit,
    qwen_image_edit_plus,
    qwen_image_layered,
)
from tiny_pipelines.pipeline import TinyPipeline
from tiny_pipelines.video import cogvideox, hunyuan_video, ltx_condition, ltx_video
from tiny_pipelines.wan import (
    anyflow,
    chronoedit,
    lucy_edit,
    skyreels_v2,
    skyreels_v2_diffusion_forcing,
    wan,
    wan_animate,
    wan_image_to_video,
    wan_two_transformers,
    wan_vace,
    wan_with_token_timesteps,
)

__all__ = [
    "FAMILIES",
    "TinyPipeline",
    "anyflow",
    "chronoedit",
    "cogvideox",
    "flux",
    "flux_kontext",
    "flux_with_hidden_image_tokens",
    "hunyuan_video",
    "ltx_condition",
    "ltx_video",
    "lucy_edit",
    "qwen_image",
    "qwen_image_edit",
    "qwen_image_edit_plus",
    "qwen_image_layered",
    "skyreels_v2",
    "skyreels_v2_diffusion_forcing",
    "wan",
    "wan_animate",
    "wan_image_to_video",
    "wan_two_transformers",
    "wan_vace",
    "wan_with_token_timesteps",
]

FAMILIES: dict[str, Callable[[], TinyPipeline]] = {
    "wan": wan,
    "hunyuan video": hunyuan_video,
    "flux": flux,
    "qwen image": qwen_image,
    "ltx video": ltx_video,
    "cogvideox": cogvideox,
}
"""One pipeline of each kind of family, for tests that walk them: `tests/hosts/diffusers/test_families.py` has every family."""
