"""Sampling by ComfyUI itself, with tiny random models of its own classes."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from typing import Any

import comfy.sample
import pytest
import torch
from torch import Tensor

import comfyui_calls
from comfyui_source.tiny_models import FAMILIES, RELATIVES, patcher
from ditattn.hosts import comfyui as host
from ditattn.hosts.comfyui.patched_model import AROUND_FORWARD, AROUND_SAMPLING, OVERRIDE, WRAPPER_KEY
from ditattn.hosts.comfyui.picture import DENSE_COLOUR

STEPS = 4
KEYS = {"min_tokens": 0, "sparsity": 0.75, "skip_first_steps": 1}


def sampled(model: Any, name: str, sampler: str = "euler", steps: int = STEPS, cfg: float = 2.0, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.zeros((FAMILIES | RELATIVES)[name][2])
    noise = torch.randn(latents.shape, generator=generator)
    texts = [torch.randn(1, length, 32, generator=generator) for length in (7, 5)]
    conditions = [{"pooled_output": torch.randn(1, 16, generator=generator), **more} for _ in texts]
    if name == "LTX-Video":
        # its forward insists on a mask of the text
        conditions = [{**one, "attention_mask": torch.ones(1, text.shape[1])} for one, text in zip(conditions, texts, strict=True)]
    positive, negative = ([[text, one]] for text, one in zip(texts, conditions, strict=True))
    return comfy.sample.sample(model, noise, steps, cfg, sampler, "normal", positive, negative, latents, seed=1, disable_pbar=True)


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def component(handle: host.Handle) -> Any:
    report = handle.report()
    assert len(report.components) == 1
    return next(iter(report.components.values()))


@pytest.mark.parametrize("backend", host.backend_choices())
def test_sparsity_zero_is_native_and_more_really_runs(name: str, backend: str) -> None:
    model = patcher(name)
    native = sampled(model, name)
    patched, handle = host.attach(model, backend, {**KEYS, "sparsity": 0.0})
    torch.testing.assert_close(sampled(patched, name), native, rtol=1e-4, atol=1e-4)
    assert component(handle).sparse == 0
    patched, handle = host.attach(model, backend, KEYS)
    sparse = sampled(patched, name)
    ran = component(handle)
    # one dense step of four; the branches of guidance have texts of unequal length, so each has a forward of its own, or both share one
    assert ran.sparse == 3 * ran.dense
    assert ran.dense_reasons == {"first steps": ran.dense}
    assert ran.sparse_density < 0.95
    assert ran.steps_run == ran.schedule_steps == STEPS
    assert ran.sparse_density_by_layer.keys() == {0, 1}
    assert sparse.isfinite().all()
    assert not torch.allclose(sparse, native, atol=1e-3)


def test_the_model_that_went_in_is_as_before(name: str) -> None:
    model = patcher(name)
    native = sampled(model, name)
    options = model.model_options
    host.attach(model, "rain_fusion_attn", KEYS)
    assert model.model_options is options
    assert not model.model_options["transformer_options"]
    assert not any(model.get_all_wrappers(place) for place in (AROUND_SAMPLING, AROUND_FORWARD))
    assert torch.equal(sampled(model, name), native)


def test_the_layout_says_where_the_picture_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the latents changes the values of the tokens that the layout calls the picture, and of no others, in the first layer."""
    model = patcher(name)
    patched, handle = host.attach(model, "rain_fusion_attn", {**KEYS, "skip_first_steps": 0})
    caught: list[tuple[Any, Tensor]] = []
    attend = handle.attend

    def catch(forward: Any, call: Any) -> Tensor:
        out = attend(forward, call)
        if forward.layer == 0:
            caught.append((forward.layout, call.tensors()[2]))
        return out

    monkeypatch.setattr(handle, "attend", catch)
    latents = torch.randn(FAMILIES[name][2], generator=torch.Generator().manual_seed(3))
    changed = latents.clone()
    # one token of the picture: its last column of the second row
    patch = 1 if name == "LTX-Video" else 2
    changed[..., patch : 2 * patch, -patch:] += 1
    for x in (latents, changed):
        _forward(patched, name, x)
    (layout, before), (_, after) = caught
    moved = (before != after).any(dim=(0, 2, 3) if before.ndim == 4 else (0, 2)).nonzero().flatten().tolist()
    frames, rows, columns = layout.grid
    expected = [layout.num_prefix_tokens + frame * rows * columns + 2 * columns - 1 for frame in range(frames)]
    assert moved == expected


def _forward(patched: Any, name: str, x: Tensor, key: str = WRAPPER_KEY) -> None:
    """One forward as ComfyUI's samplers make it."""
    wrappers = {AROUND_FORWARD: {key: patched.get_all_wrappers(AROUND_FORWARD)}}
    options = {**patched.model_options["transformer_options"], "wrappers": wrappers}
    options |= {"sigmas": torch.tensor([1.0]), "sample_sigmas": torch.tensor([1.0, 0.5, 0.0])}
    more = {"frame_rate": 25, "attention_mask": None} if name == "LTX-Video" else {}
    if name in ("Flux", "HunyuanVideo"):
        more |= {"y": torch.zeros(1, 16), "guidance": torch.tensor([1.0])}
    context = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        patched.model.diffusion_model(x, torch.tensor([0.5]), context=context, transformer_options=options, **more)


def test_the_recorded_calls_are_those_that_comfyui_makes() -> None:
    """`COMFYUI_RECORD=1` writes them down anew."""
    found = {name: _recording(name) for name in FAMILIES}
    if os.environ.get("COMFYUI_RECORD"):
        comfyui_calls.FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == comfyui_calls.recordings()


def _recording(name: str) -> dict[str, Any]:
    model, calls, forwards = patcher(name).clone(), [], []

    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(executor.original).bind(*args, **kwargs).arguments
        forwards.append((executor.class_obj, {**given, **given.pop("kwargs", {})}))
        return executor(*args, **kwargs)

    def override(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        calls.append(comfyui_calls.recorded_call(args, kwargs))
        return func(*args, **kwargs)

    model.model_options["transformer_options"][OVERRIDE] = override
    model.add_wrapper_with_key(AROUND_FORWARD, "recording", around)
    _forward(model, name, torch.randn(FAMILIES[name][2]), key="recording")
    return comfyui_calls.recorded_forward(*forwards[0], calls)


@pytest.mark.parametrize(("sampler", "calls_per_step"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 1), ("uni_pc", 1)])
def test_samplers_that_look_between_the_steps(sampler: str, calls_per_step: int) -> None:
    patched, handle = host.attach(patcher("Wan"), "rain_fusion_attn", {**KEYS, "skip_first_steps": 2})
    sampled(patched, "Wan", sampler, steps=6, cfg=1.0)
    ran = component(handle)
    assert ran.steps_run == ran.schedule_steps == 6
    # two layers; the last step of a sampler of second order is of first order
    assert ran.dense >= 2 * 2 * calls_per_step - 2
    assert {step for step, density in ran.sparse_density_by_step.items() if density is None} == {0, 1}


def test_every_sampling_has_a_report_of_its_own() -> None:
    patched, handle = host.attach(patcher("Wan"), "permuted_sparse_attn", KEYS)
    first = sampled(patched, "Wan")
    once = component(handle)
    assert torch.equal(sampled(patched, "Wan"), first)
    again = component(handle)
    assert (again.calls, again.sparse_density) == (once.calls, once.sparse_density)


def test_a_node_behind_ours_clones_the_model_and_the_handle_goes_on_counting() -> None:
    patched, handle = host.attach(patcher("Wan"), "rain_fusion_attn", KEYS)
    sampled(patched.clone().clone(), "Wan")
    assert component(handle).sparse > 0


def test_a_second_node_replaces_the_first() -> None:
    patched, first = host.attach(patcher("Wan"), "rain_fusion_attn", KEYS)
    patched, second = host.attach(patched, "permuted_sparse_attn", KEYS)
    sampled(patched, "Wan")
    assert not first.report().components
    assert component(second).backend == "permuted_sparse_attn"


def test_dense_calls_go_to_the_node_before_ours() -> None:
    model = patcher("Wan").clone()
    seen: list[int] = []

    def counting(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        seen.append(args[0].shape[1])
        return func(*args, **kwargs)

    model.model_options["transformer_options"][OVERRIDE] = counting
    patched, handle = host.attach(model, "rain_fusion_attn", KEYS)
    sampled(patched, "Wan")
    ran = component(handle)
    # cross-attention in every layer and step, self-attention in the dense ones
    assert len(seen) == ran.calls + ran.dense


def test_a_padded_text_of_hunyuan_video_is_masked_and_sparse() -> None:
    model = patcher("HunyuanVideo")
    # the refiner of the text sees the mask too
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    native = sampled(model, "HunyuanVideo", cfg=1.0, attention_mask=mask)
    patched, handle = host.attach(model, "rain_fusion_attn", {**KEYS, "sparsity": 0.0})
    torch.testing.assert_close(sampled(patched, "HunyuanVideo", cfg=1.0, attention_mask=mask), native, rtol=1e-4, atol=1e-4)
    patched, handle = host.attach(model, "rain_fusion_attn", KEYS)
    sampled(patched, "HunyuanVideo", cfg=1.0, attention_mask=mask)
    assert component(handle).sparse == 6


def test_reference_images_have_grids_of_their_own() -> None:
    for name in ("Flux", "Qwen-Image"):
        reference = torch.randn(FAMILIES[name][2])[..., :32]
        patched, handle = host.attach(patcher(name), "rain_fusion_attn", KEYS)
        sampled(patched, name, cfg=1.0, reference_latents=[reference])
        ran = component(handle)
        assert ran.token_grids == {"1x40x32 + 1x40x16": STEPS}
        assert ran.sparse == 6


@pytest.mark.parametrize(
    ("name", "layers", "grids"), [("VACE", 4, "5x16x16"), ("camera", 2, "5x16x16"), ("reference", 2, "5x16x16 + 1x16x16")]
)
def test_relatives_of_wan(name: str, layers: int, grids: str) -> None:
    more = {"reference_latents": [torch.randn(1, 16, 1, 32, 32)]} if name == "reference" else {}
    model = patcher(name)
    native = sampled(model, name, cfg=1.0, **more)
    patched, handle = host.attach(model, "permuted_sparse_attn", {**KEYS, "sparsity": 0.0})
    torch.testing.assert_close(sampled(patched, name, cfg=1.0, **more), native, rtol=1e-4, atol=1e-4)
    patched, handle = host.attach(model, "permuted_sparse_attn", KEYS)
    assert not torch.allclose(sampled(patched, name, cfg=1.0, **more), native, atol=1e-3)
    ran = component(handle)
    assert (ran.sparse, ran.dense) == (3 * layers, layers)
    assert ran.sparse_density_by_layer.keys() == set(range(layers))
    assert ran.token_grids == {grids: STEPS}


def test_compiled_models_are_counted_in_every_step() -> None:
    model = patcher("Wan")
    patched, handle = host.attach(model, "rain_fusion_attn", KEYS)
    eager = sampled(patched, "Wan")
    patched.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
    torch.testing.assert_close(sampled(patched, "Wan"), eager, rtol=1e-4, atol=1e-4)
    ran = component(handle)
    assert ran.sparse == 3 * ran.dense > 0


def test_the_nodes(nodes: Any) -> None:
    attention, report = nodes.NODE_CLASS_MAPPINGS["DitattnAttention"], nodes.NODE_CLASS_MAPPINGS["DitattnReport"]
    kinds = attention.INPUT_TYPES()["required"]
    widgets = {name: kind[1].get("default", kind[0][0]) for name, kind in kinds.items() if name != "model"}
    model = patcher("Wan")
    patched, handle = getattr(attention(), attention.FUNCTION)(model, **widgets)
    assert handle.setting.keys == {"preset": "balanced"}
    samples = {"samples": sampled(patched, "Wan")}
    result = getattr(report(), report.FUNCTION)(handle, samples)
    text, picture = result["result"]
    assert "permuted_sparse_attn" in text
    # 1280 tokens are fewer than min_tokens: the picture is dense
    assert picture.shape == (1, 2 * 12, STEPS * 12, 3)
    assert picture.unique().tolist() == pytest.approx(sorted(DENSE_COLOUR))
    patched, handle = host.attach(model, "rain_fusion_attn", KEYS)
    sampled(patched, "Wan")
    _, picture = getattr(report(), report.FUNCTION)(handle, samples)["result"]
    assert picture[0, 0, 0].tolist() == pytest.approx(DENSE_COLOUR)
    assert (picture[0, 0, -1] > picture[0, 0, 0]).all()
