"""Every family through a whole pipeline: nothing changes at sparsity 0, lower densities really run, and leaving leaves no trace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from packaging import version
from torch import Tensor, nn

import ditattn
import tiny_pipelines
from ditattn.hosts.diffusers.install import denoisers, self_attention_modules
from ditattn.models import MODELS, TokenLayout, family_of, known_class
from ditattn.runtime.stage import DenoisingStage, Forward, running
from tiny_pipelines import TinyPipeline, latent_images, packed_images
from tiny_pipelines.footprint import dispatcher_footprint, footprint

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE_BACKENDS = ("rain_fusion_attn", "block_sparse_attn", "permuted_sparse_attn")
NUM_STEPS, NUM_LAYERS = 3, 2
# fp32, latents of order 1. The native kernel on the same numbers is bit-identical; another exact one sums in another order, and guidance 6
# over three steps makes ten times as much of the difference. Dropping blocks moves these latents by 5e-3 and more.
OTHER_KERNEL_BOUND = 1e-4


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
    "ideogram 4": Case(packed_images.ideogram4, "scheduler", 1, text=(slice(3, None), slice(None)), since="0.42"),
    "nucleusmoe image": Case(packed_images.nucleusmoe_image, "scheduler", 1, since="0.42"),
}
CASES |= VIDEOS | IMAGES
# text masked before the image, layers of the image alone, blocks of two kinds, square masks, a call per sample, a suffix that varies,
# a packed sequence, text that is keys only
QUICK = {"chroma", "stable diffusion 3", "wan vace", "hunyuan video 1.5", "mochi", "motif video", "minimax h3", "prx"}


def families(*left_out: str) -> pytest.MarkDecorator:
    """Parametrises a test by the families' names; of those that came later, most are slow."""
    slow = (VIDEOS.keys() | IMAGES.keys()) - QUICK
    names = [name for name in CASES if name not in left_out]
    return pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in slow else []) for name in names])


every_family = families()


@cache
def built(name: str) -> tuple[TinyPipeline, Tensor]:
    """A pipeline, shared by the tests of a family since each must leave it as it was, and its native latents."""
    case = CASES[name]
    if version.parse(case.since) > DIFFUSERS:
        pytest.skip(f"diffusers {DIFFUSERS} does not have it: since {case.since}")
    tiny = case.build()
    return tiny, tiny.run(NUM_STEPS)


@pytest.mark.slow
@pytest.mark.skipif(version.parse("0.42") > DIFFUSERS, reason="an older diffusers has fewer families")
def test_every_family_is_run_here() -> None:
    run = {known_class(denoiser) for case in CASES.values() for denoiser in denoisers(case.build().pipe).values()}
    # test_qwen_image21.py: its first step makes no calls that come here
    assert run | {"QwenImage21Transformer2DModel"} == {name for family in MODELS for name in family.transformer_classes}


@every_family
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_sparsity_zero_is_native(name: str, backend: str) -> None:
    tiny, native = built(name)
    with ditattn.install(tiny.pipe, backend, sparsity=0) as handle:
        out = tiny.run(NUM_STEPS)
    # the fastest exact kernel of the machine serves, which need not be the native one
    torch.testing.assert_close(out, native, rtol=0, atol=OTHER_KERNEL_BOUND)
    for component, steps in CASES[name].steps.items():
        expected = {"sparsity 0": len(steps) * CASES[name].forwards * NUM_LAYERS}
        assert handle.report().components[component].dense_reasons == expected


@every_family
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_keeping_every_block_through_the_sparse_kernel_is_native(name: str, backend: str) -> None:
    tiny, native = built(name)
    # of 12 blocks or fewer, a sparsity of 1 % drops none: order, plan, kernel and inverse order run all the same
    least = 1e-4 if backend == "permuted_sparse_attn" else 0.01
    with ditattn.install(tiny.pipe, backend, sparsity=least, skip_first_steps=0, min_tokens=0) as handle:
        out = tiny.run(NUM_STEPS)
    torch.testing.assert_close(out, native, rtol=0, atol=OTHER_KERNEL_BOUND)
    # its padding fills whole blocks, and that backend computes no block of padding alone
    without_padding = backend == "permuted_sparse_attn" and name == "hunyuan video 1.5"
    for component in handle.report().components.values():
        assert component.dense == 0
        assert component.sparse_density == 1.0 or (without_padding and component.sparse_density > 0.7)


@every_family
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_lower_density_runs_in_the_right_steps_and_layers(name: str, backend: str) -> None:
    tiny, native = built(name)
    case = CASES[name]
    with ditattn.install(tiny.pipe, backend, sparsity=0.6, skip_first_steps=1, min_tokens=0) as handle:
        out = tiny.run(NUM_STEPS)
    assert out.isfinite().all()
    assert (out - native).abs().max() > 1e-3
    report = handle.report()
    assert set(report.components) == set(case.steps)
    for component, steps in case.steps.items():
        ran = report.components[component]
        calls = case.forwards * NUM_LAYERS
        forwards = 1 if name == "mochi" else case.forwards
        assert ran.step_sources == {case.source: len(steps) * forwards}
        assert ran.dense_reasons == ({"first steps": calls} if 0 in steps else {})
        assert ran.sparse == calls * len([step for step in steps if step > 0])
        # of blocks two fifths are kept; a kept short one holds fewer pairs
        assert ran.sparse_density is None or 0.36 <= ran.sparse_density < case.densest
        assert {step: density is not None for step, density in ran.sparse_density_by_step.items()} == {step: step > 0 for step in steps}
        assert list(ran.sparse_density_by_layer) == list(range(NUM_LAYERS))


@every_family
def test_leaving_leaves_no_trace(name: str) -> None:
    tiny, native = built(name)
    before = footprint(tiny.pipe)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=0, min_tokens=0):
        assert footprint(tiny.pipe) != before
        assert not torch.equal(tiny.run(NUM_STEPS), native)
    assert footprint(tiny.pipe) == before
    assert torch.equal(tiny.run(NUM_STEPS), native)


@every_family
def test_an_exception_in_the_middle_of_a_run_leaves_no_trace(name: str) -> None:
    tiny, native = built(name)
    before = footprint(tiny.pipe)
    last = list(denoisers(tiny.pipe).values())[-1]
    with _raising_in_call(CASES[name].forwards + 1, last):
        raising = footprint(tiny.pipe)
        install = ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=0, min_tokens=0)
        with pytest.raises(ZeroDivisionError), install:
            tiny.run(NUM_STEPS)
        assert footprint(tiny.pipe) == raising
    assert running() is None
    assert footprint(tiny.pipe) == before
    assert torch.equal(tiny.run(NUM_STEPS), native)


@every_family
def test_bystanders_keep_their_own_attention(name: str) -> None:
    tiny, native = built(name)
    other = CASES[name].build()
    dispatcher = dispatcher_footprint()
    with ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=0, min_tokens=0) as handle:
        assert dispatcher_footprint()["active"] == dispatcher["active"]
        assert dispatcher_footprint()["names"] == dispatcher["names"]
        assert torch.equal(other.run(NUM_STEPS), native)
        assert all(component.calls == 0 for component in handle.report().components.values())
        assert all(getattr(processor, "_attention_backend", None) is None for processor in _unserved_processors(tiny))


# the prompt of these also modulates every token
@families("mochi", "lumina next")
def test_text_stands_where_the_layout_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, _ = built(name)
    keys = _recorded_keys(monkeypatch)
    embeddings = {key: _moved(value) for key, value in tiny.arguments.items() if key in EMBEDDINGS}
    changed: dict[str, Any] = {"prompt": "a dog"} if "prompt" in tiny.arguments else embeddings
    with ditattn.install(tiny.pipe, "torch_sdpa"):
        for arguments in ({}, changed):
            tiny.run(1, **arguments)
    half, any_moved = len(keys) // 2, False
    for (before, layout), (after, _) in zip(keys[:half], keys[half:], strict=True):
        moved = (before != after).any(-1).any(-1).any(0)
        expected = torch.zeros(len(moved), dtype=torch.bool)
        in_front, behind = CASES[name].text
        expected[: layout.num_prefix_tokens][in_front] = True
        expected[_end_of_video(layout) :][behind] = True
        # of the two CFG branches, or of the two halves of a batch, one has the changed prompt
        if moved.any():
            assert torch.equal(moved, expected)
        any_moved = any_moved or bool(moved.any())
    # text in cross-attention moves nothing
    assert any_moved == bool(expected.any())


def _moved(embeddings: Any) -> Any:
    return [one + 1 for one in embeddings] if isinstance(embeddings, list) else embeddings + 1


# the axes of latents `(B, C, T, H, W)` in the order of the model's own
AXES = {
    "cogvideox, DPM": (0, 2, 1, 3, 4),
    "cogvideox, DDIM": (0, 2, 1, 3, 4),
    "consisid": (0, 2, 1, 3, 4),
    "anyflow": (0, 2, 1, 3, 4),
    "kandinsky 5": (0, 4, 1, 2, 3),
    "kandinsky 6": (0, 4, 1, 2, 3),
}
NOT_LATENTS = ("flux", "flux kontext", "qwen image", "ltx video", "ltx 2", "minimax h3", *IMAGES)


@families(*NOT_LATENTS)
def test_a_latent_pixel_is_the_token_that_the_layout_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, _ = built(name)
    transformer, calls = tiny.pipe.transformer, []
    keys = _recorded_keys(monkeypatch)
    spy = transformer.register_forward_pre_hook(lambda _module, _args, arguments: calls.append(dict(arguments)), with_kwargs=True)
    with spy, torch.no_grad(), ditattn.install(tiny.pipe, "torch_sdpa"):
        tiny.run(1)
        keys.clear()
        latents = calls[0]["hidden_states"].clone()
        transformer(**calls[0])
        layout = keys[0][1]
        by_axis = latents.permute(AXES.get(name, (0, 1, 2, 3, 4)))
        by_axis[(slice(None), slice(None), *(size * place for size, place in zip(layout.patch_size, (2, 3, 5), strict=True)))] += 1
        transformer(**{**calls[0], "hidden_states": latents})
    (before, layout), (after, _) = keys
    _, rows, columns = (size // patch for size, patch in zip(layout.raw_latent_shape[2:], layout.patch_size, strict=True))
    moved = (before != after).any(-1).any(-1).any(0).nonzero().flatten().tolist()
    assert moved == [layout.num_prefix_tokens + (2 * rows + 3) * columns + 5]
    if not family_of(transformer).suffix_varies:
        assert _end_of_video(layout) + layout.num_suffix_tokens == before.shape[1]


def _end_of_video(layout: TokenLayout) -> int:
    return layout.num_prefix_tokens + math.prod(
        size // patch for size, patch in zip(layout.raw_latent_shape[2:], layout.patch_size, strict=True)
    )


EMBEDDINGS = ("prompt_embeds", "prompt_embeds_2", "prompt_embeds_t5", "prompt_embeds_llama3")


def _recorded_keys(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, TokenLayout]]:
    """Keys of every forward's first self-attention call over all tokens from now on, and the forward's layout."""
    recorded = []
    seen: list[Forward] = []
    served = DenoisingStage.attend

    def record(stage: DenoisingStage, forward: Forward, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        if forward.layer not in forward.model.image_layers and all(forward is not one for one in seen):
            assert forward.layout is not None
            recorded.append((key.clone(), forward.layout))
            seen.append(forward)
        return served(stage, forward, query, key, *rest)

    monkeypatch.setattr(DenoisingStage, "attend", record)
    return recorded


@contextlib.contextmanager
def _raising_in_call(number: int, denoiser: nn.Module) -> Iterator[None]:
    """The last attention module of a denoiser raises in its n-th call."""
    calls = iter(range(1, 1000))

    def count(*_: object) -> None:
        if next(calls) == number:
            raise ZeroDivisionError

    module = [part for part in denoiser.modules() if hasattr(part, "processor")][-1]
    with module.register_forward_pre_hook(count):
        yield


def _unserved_processors(tiny: TinyPipeline) -> list[object]:
    served = [part for model in denoisers(tiny.pipe).values() for part in self_attention_modules(model, family_of(model)).values()]
    parts = [part for part in tiny.pipe.components.values() if isinstance(part, nn.Module)]
    modules = [module for part in parts for module in part.modules() if hasattr(module, "processor")]
    return [module.processor for module in modules if all(module is not one for one in served)]
