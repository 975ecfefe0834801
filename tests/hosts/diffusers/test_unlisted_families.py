"""Families that are served, as if nobody had described them: the rule finds the layout that their files say, or none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import ditattn
import tiny_pipelines
from ditattn import models
from ditattn.hosts.diffusers.install import denoisers
from ditattn.models import TokenLayout, family_of
from ditattn.models.base import ModelFamily
from ditattn.runtime.stage import DenoisingStage
from tiny_pipelines import TinyPipeline, latent_images, packed_images

pytestmark = pytest.mark.usefixtures("one_thread")

PACKED = "packed: their shape does not tell frames, rows and columns"
NO_SELF_ATTENTION = "no module in it makes queries and keys of one input"
HEAD_SIZES = "its heads must be of one size"
# the layout is found, but every call has a square mask that the rule cannot read as key padding
MASKED = {"hunyuan video 1.5"}
# the layers that see the image alone are served, beside which those with text run densely
IMAGE_ALONE = {"lumina 2"}
slow = pytest.mark.slow

# the pipeline, and how the tokens of its layers are found: "" as its file says, else why they are not
CASES: dict[str, tuple[Callable[[], TinyPipeline], str]] = {
    "wan": (tiny_pipelines.wan, ""),
    "cogvideox": (tiny_pipelines.cogvideox, ""),
    "flux": (tiny_pipelines.flux, PACKED),
    "pixart": (latent_images.pixart, ""),
    # text behind the video
    "hunyuan video": (tiny_pipelines.hunyuan_video, ""),
    # a layer that sees the image alone beside those with text
    "stable diffusion 3": (latent_images.stable_diffusion_3, ""),
    # both branches of guidance are one batch
    "mochi": (tiny_pipelines.mochi, "makes several calls in one forward"),
}
SLOW: dict[str, tuple[Callable[[], TinyPipeline], str]] = {
    "wan animate": (tiny_pipelines.wan_animate, ""),
    "framepack": (tiny_pipelines.hunyuan_video_framepack, ""),
    "hunyuan video 1.5": (tiny_pipelines.hunyuan_video15, ""),
    "cosmos": (tiny_pipelines.cosmos, ""),
    "kandinsky 5": (tiny_pipelines.kandinsky5, NO_SELF_ATTENTION),
    "helios": (tiny_pipelines.helios, ""),
    "allegro": (tiny_pipelines.allegro, ""),
    "motif video": (tiny_pipelines.motif_video, ""),
    "easyanimate": (tiny_pipelines.easyanimate, ""),
    "ltx 2": (tiny_pipelines.ltx2, HEAD_SIZES),
    "minimax h3": (tiny_pipelines.minimax_h3, PACKED),
    "flux 2": (packed_images.flux2, PACKED),
    "aura flow": (latent_images.aura_flow, ""),
    "lumina 2": (latent_images.lumina2, ""),
    "hidream": (latent_images.hidream_image, ""),
    "prx": (latent_images.prx, NO_SELF_ATTENTION),
    "hunyuan image": (latent_images.hunyuan_image, ""),
    "joyimage edit": (latent_images.joyimage_edit, NO_SELF_ATTENTION),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=[slow]) for name in SLOW)])
def test_the_rule_finds_what_the_file_says_or_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, reason = {**CASES, **SLOW}[name]
    tiny = build()
    families: dict[int, ModelFamily | None] = {id(denoiser): family_of(denoiser) for denoiser in denoisers(tiny.pipe).values()}
    (family,) = {id(one): one for one in families.values()}.values()
    assert family is not None
    native = tiny.run(1)
    monkeypatch.setattr(models, "MODELS", ())
    seen: list[tuple[TokenLayout | None, TokenLayout]] = []
    enter = DenoisingStage.enter

    def note(stage: DenoisingStage, model: Any, arguments: Any, *rest: Any, **named: Any) -> Any:
        forward = enter(stage, model, arguments, *rest, **named)
        seen.append((forward.layout, family.layout(model.model_config, arguments)))
        return forward

    monkeypatch.setattr(DenoisingStage, "enter", note)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=0, min_tokens=0) as handle:
        out = tiny.run(1)
    report = handle.report()
    if not report.components:
        assert reason
        assert reason in report.not_served["transformer"]
        assert torch.equal(out, native)
        return
    component = next(iter(report.components.values()))
    assert seen
    if reason:
        assert reason in component.model
        assert all(found is None for found, _ in seen)
        torch.testing.assert_close(out, native, rtol=0, atol=1e-4)
        return
    for found, said in seen:
        assert found is not None
        # the rule keeps further grids whole, and finds the text behind a video where a family reads it from each call
        expected = replace(said, further_grids=(), num_image_suffix_tokens=0)
        if name in IMAGE_ALONE:
            expected = replace(expected, num_prefix_tokens=0, num_suffix_tokens=0)
        assert found == (replace(expected, num_suffix_tokens=found.num_suffix_tokens) if family.suffix_varies else expected)
    assert (component.sparse >= 2) is (name not in MASKED)
    assert torch.equal(out, native) is (name in MASKED)


def test_attention_within_frames_and_along_time_runs_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latte, whose layers see a frame each, or a place each: listed, and refused by the rule too."""
    from diffusers import LatteTransformer3DModel

    monkeypatch.setattr(models, "NOT_SERVED", {})
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=32,
        patch_size=2,
        caption_channels=24,
        cross_attention_dim=64,
        video_length=5,
        norm_type="ada_norm_single",
    ).eval()
    latents, text = torch.randn(1, 4, 5, 32, 32), torch.randn(1, 6, 24)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return transformer(latents, timestep=torch.tensor([500]), encoder_hidden_states=text, enable_temporal_attentions=True).sample

    native = run()
    with ditattn.install(transformer, "rain_fusion_attn", sparsity=0.6, skip_first_steps=0, min_tokens=0) as handle, ditattn.step(0, 2):
        out = run()
    torch.testing.assert_close(out, native, rtol=0, atol=1e-4)
    component = handle.report().components["LatteTransformer3DModel"]
    assert component.sparse == 0
    assert "its attention runs within parts of the grid: 5 sequences of 256 tokens for a batch of 1" in component.model
