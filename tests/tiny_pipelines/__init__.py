"""Tiny random-weight pipelines of every family: built in the test, nothing downloaded, a second or less each.

Head size 32, and 10 to 12 blocks of 128 tokens: the least at which both sparse backends drop something.
"""

from __future__ import annotations

from collections.abc import Callable

from tiny_pipelines.image import flux, flux_kontext, qwen_image, qwen_image_edit, qwen_image_edit_plus, qwen_image_layered
from tiny_pipelines.pipeline import TinyPipeline
from tiny_pipelines.video import cogvideox, hunyuan_video, ltx_condition, ltx_video
from tiny_pipelines.wan import wan, wan_image_to_video, wan_two_transformers, wan_with_token_timesteps

__all__ = [
    "FAMILIES",
    "TinyPipeline",
    "cogvideox",
    "flux",
    "flux_kontext",
    "hunyuan_video",
    "ltx_condition",
    "ltx_video",
    "qwen_image",
    "qwen_image_edit",
    "qwen_image_edit_plus",
    "qwen_image_layered",
    "wan",
    "wan_image_to_video",
    "wan_two_transformers",
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
"""One pipeline of every served family, for tests that walk them."""
