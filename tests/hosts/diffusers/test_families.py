"""Every family through a whole pipeline: nothing changes at sparsity 0, lower densities really run, and leaving leaves no trace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from packaging import version
from torch import Tensor, nn

import ditattn
from ditattn.errors import UnsupportedCall
from ditattn.hosts.diffusers.install import denoisers, self_attention_modules
from ditattn.models import MODELS, TokenLayout, family_of, known_class
from ditattn.runtime.forward import Forward, running
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.stage import DenoisingStage
from family_cases import CASES, DIFFUSERS, IMAGES, QUICK, VIDEOS
from pairwise import each_with_one
from tiny_pipelines import TinyPipeline
from tiny_pipelines.footprint import dispatcher_footprint, footprint

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE_BACKENDS = ("rain_fusion_attn", "block_sparse_attn", "permuted_sparse_attn")
NUM_LAYERS = 2
NUM_STEPS = 3
# fp32, latents of order 1. The native kernel on the same numbers is bit-identical; another exact one sums in another order, and guidance 6
# over the steps makes ten times as much of the difference. Dropping blocks moves these latents by 9e-4 and more in one step.
OTHER_KERNEL_BOUND = 1e-4
# keys are padded at the end, of which FlashAttention takes no count; other masks make a call torch's own with every dense backend
PADDED = {"hunyuan video", "hunyuan video 1.5", "motif video", "hunyuan image", "ernie image", "nucleusmoe image"}


def families(*left_out: str) -> pytest.MarkDecorator:
    """Parametrises a test by the families' names; of those that came later, most are slow."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=slow(name)) for name in CASES if name not in left_out])


def slow(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if name in (VIDEOS.keys() | IMAGES.keys()) - QUICK else []


every_family = families()
WITH_DENSE_BACKENDS = [
    pytest.param(name, backend, marks=slow(name), id=f"{backend}-{name}")
    for name in CASES
    for backend in ("torch_sdpa", "fa", "laser_attn")
    if backend != "fa" or name not in PADDED
]


def least_steps(name: str) -> int:
    """One, or two where a second denoiser begins in the second: for what every step must keep to."""
    return 1 + max(min(steps) for steps in CASES[name].steps.values())


def steps_of(name: str, num_steps: int) -> dict[str, list[int]]:
    """Steps of every denoiser."""
    return {component: [step for step in steps if step < num_steps] for component, steps in CASES[name].steps.items()}


@cache
def built(name: str) -> tuple[TinyPipeline, Tensor]:
    """A pipeline, shared by the tests of a family since each must leave it as it was, and its native latents."""
    case = CASES[name]
    if version.parse(case.since) > DIFFUSERS:
        pytest.skip(f"diffusers {DIFFUSERS} does not have it: since {case.since}")
    tiny = case.build()
    return tiny, tiny.run(least_steps(name))


@pytest.mark.slow
@pytest.mark.skipif(version.parse("0.42") > DIFFUSERS, reason="an older diffusers has fewer families")
def test_every_family_is_run_here() -> None:
    run = {known_class(denoiser) for case in CASES.values() for denoiser in denoisers(case.build().pipe).values()}
    # test_qwen_image21.py: its first step makes no calls that come here
    assert run | {"QwenImage21Transformer2DModel"} == {name for family in MODELS for name in family.transformer_classes}


@pytest.mark.shows("backend")
@pytest.mark.parametrize(("name", "backend"), WITH_DENSE_BACKENDS)
def test_a_dense_backend_is_native(name: str, backend: str) -> None:
    if backend == "fa":
        _same_masks()
    tiny, native = built(name)
    with ditattn.install(tiny.pipe, backend) as handle:
        torch.testing.assert_close(tiny.run(least_steps(name)), native, rtol=0, atol=OTHER_KERNEL_BOUND)
    for component, steps in steps_of(name, least_steps(name)).items():
        assert handle.report().components[component].calls == len(steps) * CASES[name].forwards * NUM_LAYERS


@pytest.mark.shows("fa", says="no: padded")
@pytest.mark.parametrize("name", [pytest.param(name, marks=slow(name)) for name in CASES if name in PADDED])
def test_flash_attention_refuses_padding(name: str) -> None:
    _same_masks()
    tiny, native = built(name)
    with ditattn.install(tiny.pipe, "fa"), pytest.raises(UnsupportedCall, match="does not honour key_lengths"):
        tiny.run(1)
    assert torch.equal(tiny.run(least_steps(name)), native)


def _same_masks() -> None:
    if version.parse("0.42") > DIFFUSERS:
        pytest.skip("an older diffusers masks other families")


@pytest.mark.parametrize(("name", "backend"), each_with_one(CASES, SPARSE_BACKENDS, marks=slow))
def test_sparsity_zero_is_native(name: str, backend: str) -> None:
    tiny, native = built(name)
    with ditattn.install(tiny.pipe, backend, sparsity=0) as handle:
        out = tiny.run(least_steps(name))
    # the fastest exact kernel of the machine serves, which need not be the native one
    torch.testing.assert_close(out, native, rtol=0, atol=OTHER_KERNEL_BOUND)
    for component, steps in steps_of(name, least_steps(name)).items():
        expected = {"sparsity 0": len(steps) * CASES[name].forwards * NUM_LAYERS}
        assert handle.report().components[component].dense_reasons == expected


@pytest.mark.parametrize(("name", "backend"), each_with_one(CASES, SPARSE_BACKENDS, start=1, marks=slow))
def test_keeping_every_block_through_the_sparse_kernel_is_native(name: str, backend: str) -> None:
    """Layout, masks and calls of a family are the same for every backend, and what a backend makes of them is tested by itself."""
    tiny, native = built(name)
    # of 12 blocks or fewer, a sparsity of 1 % drops none: order, plan, kernel and inverse order run all the same
    least = 1e-4 if backend == "permuted_sparse_attn" else 0.01
    with ditattn.install(tiny.pipe, backend, sparsity=least, skip_first_steps=0, min_tokens=0) as handle:
        out = tiny.run(least_steps(name))
    torch.testing.assert_close(out, native, rtol=0, atol=OTHER_KERNEL_BOUND)
    # its padding fills whole blocks, and that backend computes no block of padding alone
    without_padding = backend == "permuted_sparse_attn" and name == "hunyuan video 1.5"
    for component in handle.report().components.values():
        assert component.dense == 0
        assert component.sparse_density == 1.0 or (without_padding and component.sparse_density > 0.7)


@pytest.mark.shows("backend")
@pytest.mark.shows("references")
@every_family
@pytest.mark.parametrize("backend", SPARSE_BACKENDS)
def test_lower_density_runs(name: str, backend: str) -> None:
    tiny, native = built(name)
    case = CASES[name]
    with ditattn.install(tiny.pipe, backend, sparsity=0.6, skip_first_steps=0, min_tokens=0) as handle:
        out = tiny.run(least_steps(name))
    assert out.isfinite().all()
    assert (out - native).abs().max() > 5 * OTHER_KERNEL_BOUND
    report = handle.report()
    assert set(report.components) == set(case.steps)
    for component, steps in steps_of(name, least_steps(name)).items():
        ran = report.components[component]
        assert ran.dense == 0
        assert ran.sparse == case.forwards * NUM_LAYERS * len(steps)
        # of blocks two fifths are kept; a kept short one holds fewer pairs
        assert 0.36 <= ran.sparse_density < case.densest
        assert list(ran.sparse_density_by_layer) == list(range(NUM_LAYERS))


@pytest.mark.parametrize(("name", "backend"), each_with_one(CASES, SPARSE_BACKENDS, start=2, marks=slow))
def test_steps_are_those_of_the_run(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what says the step, and by the time, which falls from step to step: what steps are told by where no scheduler is at hand."""
    tiny, _ = built(name)
    case = CASES[name]
    times = _noted_times(monkeypatch)
    with ditattn.install(tiny.pipe, backend, sparsity=0.6, skip_first_steps=1, min_tokens=0) as handle:
        out = tiny.run(NUM_STEPS)
    assert out.isfinite().all()
    for component, steps in steps_of(name, NUM_STEPS).items():
        ran = handle.report().components[component]
        calls = case.forwards * NUM_LAYERS
        forwards = 1 if name == "mochi" else case.forwards
        assert ran.step_sources == {case.source: len(steps) * forwards}
        assert ran.dense_reasons == ({"first steps": calls} if 0 in steps else {})
        assert ran.sparse == calls * len([step for step in steps if step > 0])
        assert {step: density is not None for step, density in ran.sparse_density_by_step.items()} == {step: step > 0 for step in steps}
        assert times[component] == sorted(times[component], reverse=True)
        assert len(set(times[component])) == len(steps)


def _noted_times(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Of every forward of each denoiser from now on."""
    times: dict[str, list[float]] = {}
    enter = DenoisingStage.enter

    def note(stage: DenoisingStage, model: ServedModel, arguments: dict[str, Any], *rest: Any, **named: Any) -> Forward:
        times.setdefault(model.name, []).append(float(torch.as_tensor(model.family.time(arguments)).max()))
        return enter(stage, model, arguments, *rest, **named)

    monkeypatch.setattr(DenoisingStage, "enter", note)
    return times


@every_family
def test_leaving_leaves_no_trace(name: str) -> None:
    tiny, native = built(name)
    before = footprint(tiny.pipe)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=0, min_tokens=0):
        assert footprint(tiny.pipe) != before
        assert not torch.equal(tiny.run(least_steps(name)), native)
    assert footprint(tiny.pipe) == before
    assert torch.equal(tiny.run(least_steps(name)), native)


@every_family
def test_an_exception_in_the_middle_of_a_run_leaves_no_trace(name: str) -> None:
    tiny, native = built(name)
    before = footprint(tiny.pipe)
    last = list(denoisers(tiny.pipe).values())[-1]
    with _raising_in_call(CASES[name].forwards + 1, last):
        raising = footprint(tiny.pipe)
        install = ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=0, min_tokens=0)
        with pytest.raises(ZeroDivisionError), install:
            # the last of two denoisers begins in the second step
            tiny.run(3)
        assert footprint(tiny.pipe) == raising
    assert running() is None
    assert footprint(tiny.pipe) == before
    assert torch.equal(tiny.run(least_steps(name)), native)


@every_family
def test_bystanders_keep_their_own_attention(name: str) -> None:
    tiny, native = built(name)
    other = CASES[name].build()
    dispatcher = dispatcher_footprint()
    with ditattn.install(tiny.pipe, "rain_fusion_attn", sparsity=0.6, skip_first_steps=0, min_tokens=0) as handle:
        assert dispatcher_footprint()["active"] == dispatcher["active"]
        assert dispatcher_footprint()["names"] == dispatcher["names"]
        assert torch.equal(other.run(least_steps(name)), native)
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
    half, any_moved, any_expected = len(keys) // 2, False, False
    for (before, layout), (after, _) in zip(keys[:half], keys[half:], strict=True):
        moved = (before != after).any(-1).any(-1).any(0)
        expected = torch.zeros(len(moved), dtype=torch.bool)
        in_front, behind = CASES[name].text
        expected[: layout.num_prefix_tokens][in_front] = True
        expected[_end_of_video(layout) :][behind] = True
        # of the two CFG branches, or of the two halves of a batch, one has the changed prompt
        if moved.any():
            assert torch.equal(moved, expected)
        any_moved, any_expected = any_moved or bool(moved.any()), any_expected or bool(expected.any())
    # text in cross-attention moves nothing
    assert any_moved == any_expected


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
