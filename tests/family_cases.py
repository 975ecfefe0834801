"""One or more pipelines of every family, and what a run of each looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
from packaging import version

import tiny_pipelines
from tiny_pipelines import TinyPipeline, latent_images, packed_images

__all__ = ["CASES", "DIFFUSERS", "IMAGES", "QUICK", "VIDEOS", "Case"]


@dataclass(frozen=True)
class Case:
    """What a run of three steps is expected to look like.

    Attributes:
        build: makes the pipeline.
        source: where the step comes from.
        forwards: forwards per step: 2 where the two CFG branches run one after the other.
        steps: steps of every denoiser.
        text: which of the tokens before and of those behind the video move with `prompt_embeds` (with `prompt`).
        densest: no density of a run with sparsity 0.6 reaches it; more than a handful of protected tokens ask for more.
        since: the first diffusers that has the pipeline, of those that the package is meant to work with.
    """

    build: Callable[[], TinyPipeline]
    source: str
    forwards: int
    steps: dict[str, list[int]] = field(default_factory=lambda: {"transformer": [0, 1, 2]})
    text: tuple[slice, slice] = (slice(None), slice(None))
    densest: float = 0.85
    since: str = "0.38"


DIFFUSERS = version.parse(diffusers.__version__)
NONE = slice(0, 0)
# from 0.41 on Wan's pipeline says the step; before, its scheduler does
WAN_SOURCE = "cache_context" if version.parse("0.41") <= DIFFUSERS else "scheduler"

CASES = {
    "wan": Case(tiny_pipelines.wan, WAN_SOURCE, 2),
    "wan image to video": Case(tiny_pipelines.wan_image_to_video, "scheduler", 2),
    "wan, two transformers": Case(tiny_pipelines.wan_two_transformers, WAN_SOURCE, 2, {"transformer": [0], "transformer_2": [1, 2]}),
    "wan, timestep per token": Case(tiny_pipelines.wan_with_token_timesteps, "scheduler", 2),
    "hunyuan video": Case(tiny_pipelines.hunyuan_video, "scheduler", 1),
    "flux": Case(tiny_pipelines.flux, "scheduler", 2),
    # its suffix is an image
    "flux kontext": Case(tiny_pipelines.flux_kontext, "scheduler", 2, text=(slice(None), NONE)),
    "qwen image": Case(tiny_pipelines.qwen_image, "scheduler", 2),
    "ltx video": Case(tiny_pipelines.ltx_video, "scheduler", 1),
    "cogvideox, DPM": Case(lambda: tiny_pipelines.cogvideox("CogVideoXDPMScheduler"), "schedule", 1),
    "cogvideox, DDIM": Case(lambda: tiny_pipelines.cogvideox("CogVideoXDDIMScheduler"), "schedule", 1),
}

VIDEOS = {
    "lucy edit": Case(tiny_pipelines.lucy_edit, "scheduler", 2),
    "wan vace": Case(tiny_pipelines.wan_vace, "scheduler", 2),
    "wan animate": Case(tiny_pipelines.wan_animate, "scheduler", 2),
    "skyreels v2": Case(tiny_pipelines.skyreels_v2, "scheduler", 2),
    "skyreels v2, diffusion forcing": Case(tiny_pipelines.skyreels_v2_diffusion_forcing, "scheduler", 2),
    "chronoedit": Case(tiny_pipelines.chronoedit, "scheduler", 2),
    "anyflow": Case(tiny_pipelines.anyflow, "scheduler", 1, since="0.42"),
    # unused image tokens and padding stand behind three glyph and nine text tokens
    "hunyuan video 1.5": Case(tiny_pipelines.hunyuan_video15, "scheduler", 2, text=(NONE, slice(12)), densest=0.96, since="0.42"),
    "framepack": Case(tiny_pipelines.hunyuan_video_framepack, "scheduler", 1, text=(NONE, slice(6, None)), densest=0.9),
    "ltx 2": Case(tiny_pipelines.ltx2, "scheduler", 1, since="0.42"),
    "cosmos": Case(tiny_pipelines.cosmos, "scheduler", 2),
    "kandinsky 5": Case(tiny_pipelines.kandinsky5, "scheduler", 2, since="0.42"),
    # two calls per layer, one for each sample
    "mochi": Case(tiny_pipelines.mochi, "scheduler", 2),
    # six image tokens before the text; in the decoder's layer the encoder's video behind the decoder's
    "motif video": Case(tiny_pipelines.motif_video, "scheduler", 2, text=(NONE, slice(6, None)), densest=0.99, since="0.42"),
    "helios": Case(tiny_pipelines.helios, "scheduler", 2, text=(NONE, NONE), since="0.42"),
    "allegro": Case(tiny_pipelines.allegro, "scheduler", 2),
    # the second encoder's text stays the same
    "easyanimate": Case(tiny_pipelines.easyanimate, "scheduler", 2, text=(slice(12), NONE)),
    "consisid": Case(tiny_pipelines.consisid, "scheduler", 2),
    "kandinsky 6": Case(tiny_pipelines.kandinsky6, "scheduler", 2, since="0.42"),
    # behind the text, a reference and audio
    "minimax h3": Case(tiny_pipelines.minimax_h3, "scheduler", 2, text=(slice(12), NONE), since="0.42"),
}

IMAGES = {
    "flux 2": Case(packed_images.flux2, "scheduler", 1),
    # images stand behind the image
    "flux 3": Case(packed_images.flux3, "scheduler", 1, text=(slice(None), NONE), since="0.42"),
    "chroma": Case(packed_images.chroma, "scheduler", 2),
    "bria": Case(packed_images.bria, "scheduler", 1),
    "bria fibo": Case(packed_images.bria_fibo, "scheduler", 1),
    "longcat image": Case(packed_images.longcat_image, "scheduler", 1, text=(slice(None), NONE)),
    "ovis image": Case(packed_images.ovis_image, "scheduler", 2),
    "stable diffusion 3": Case(latent_images.stable_diffusion_3, "scheduler", 1),
    "hunyuan image": Case(latent_images.hunyuan_image, "scheduler", 1),
    # eight learned tokens stand before the text
    "aura flow": Case(latent_images.aura_flow, "scheduler", 1, text=(slice(8, None), slice(None))),
    "cogview 4": Case(latent_images.cogview4, "scheduler", 2),
    "cogview 3 plus": Case(latent_images.cogview3_plus, "scheduler", 1),
    "krea 2": Case(packed_images.krea2, "scheduler", 2, since="0.42"),
    "z image": Case(latent_images.z_image, "scheduler", 1, text=(slice(None), slice(-32, None))),
    "lumina 2": Case(latent_images.lumina2, "scheduler", 2),
    "hidream": Case(latent_images.hidream_image, "scheduler", 1, text=(slice(None), slice(-22, None))),
    "ernie image": Case(latent_images.ernie_image, "scheduler", 1, since="0.42"),
    "glm image": Case(latent_images.glm_image, "scheduler", 1),
    "joyimage edit": Case(latent_images.joyimage_edit, "scheduler", 1, text=(slice(None), slice(-10, None)), since="0.42"),
    "joyimage edit plus": Case(latent_images.joyimage_edit_plus, "scheduler", 1, text=(slice(None), slice(-12, None)), since="0.42"),
    "pixart": Case(latent_images.pixart, "scheduler", 1),
    "prx": Case(latent_images.prx, "scheduler", 1),
    "hunyuan dit": Case(latent_images.hunyuan_dit, "scheduler", 1),
    "lumina next": Case(latent_images.lumina_next, "scheduler", 1),
    # three tokens of padding before the text
    "ideogram 4": Case(
        packed_images.ideogram4,
        "scheduler",
        1,
        {"transformer": [0, 1, 2], "unconditional_transformer": [0, 1, 2]},
        text=(slice(3, None), slice(None)),
        since="0.42",
    ),
    "nucleusmoe image": Case(packed_images.nucleusmoe_image, "scheduler", 1, since="0.42"),
}
CASES |= VIDEOS | IMAGES
# text masked before the image, layers of the image alone, blocks of two kinds, square masks, a call per sample, a suffix that varies,
# a packed sequence, text that is keys only
QUICK = {"chroma", "stable diffusion 3", "wan vace", "hunyuan video 1.5", "mochi", "motif video", "minimax h3", "prx"}
