"""Tiny random-weight pipelines of every family: built in the test, nothing downloaded, a second or less each.

Head size 32, and 10 to 12 blocks of 128 tokens: the least at which both sparse backends drop something.
"""

from __future__ import annotations

from collections.abc import Callable

from tiny_pipelines.hunyuan import hunyuan_video15, hunyuan_video_framepack
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
from tiny_pipelines.worlds import (
    allegro,
    consisid,
    cosmos,
    easyanimate,
    helios,
    kandinsky5,
    kandinsky6,
    ltx2,
    minimax_h3,
    mochi,
    motif_video,
)

__all__ = [
    "FAMILIES",
    "FEW_TOKENS",
    "TinyPipeline",
    "allegro",
    "anyflow",
    "chronoedit",
    "cogvideox",
    "consisid",
    "cosmos",
    "easyanimate",
    "few_tokens",
    "flux",
    "flux_kontext",
    "flux_with_hidden_image_tokens",
    "helios",
    "hunyuan_video",
    "hunyuan_video15",
    "hunyuan_video_framepack",
    "kandinsky5",
    "kandinsky6",
    "ltx2",
    "ltx_condition",
    "ltx_video",
    "lucy_edit",
    "minimax_h3",
    "mochi",
    "motif_video",
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

FEW_TOKENS: dict[str, dict[str, int]] = {
    "wan": {"num_frames": 5},
    "hunyuan video": {"num_frames": 5},
    "flux": {"height": 32, "width": 40},
    "qwen image": {"height": 128, "width": 160},
    "ltx video": {"num_frames": 3},
    "cogvideox": {"num_frames": 5},
}


def few_tokens(tiny: TinyPipeline, name: str) -> TinyPipeline:
    """The same pipeline with 320 to 572 tokens, for tests of which calls run: attention costs a sixth or less. Of three to five blocks
    rain_fusion_attn drops a few, the other sparse backends none.
    """
    tiny.arguments |= FEW_TOKENS[name]
    return tiny
