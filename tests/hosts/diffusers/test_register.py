"""register: our names in diffusers' own `set_attention_backend`, and every trace of them gone afterwards."""

from __future__ import annotations

import copy
import gc
import importlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from packaging import version

import ditattn
import tiny_pipelines
from ditattn import models
from ditattn.errors import DenseInStrictMode, UnknownKey, UnsupportedModel
from ditattn.hosts.diffusers.install import denoisers
from family_cases import CASES, DIFFUSERS, IMAGES, QUICK, VIDEOS
from tiny_pipelines import TinyPipeline, few_tokens
from tiny_pipelines.footprint import dispatcher_footprint, footprint
from tiny_pipelines.wan import SIZE, transformer

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"sparsity": 0.6, "skip_first_steps": 1, "min_tokens": 0}


@pytest.fixture(scope="module", autouse=True)
def _little_to_search() -> None:
    """A registration looks through all objects of the process, twice: what the imports made, half a million, stays out of sight."""
    importlib.import_module("tiny_pipelines.everything")
    gc.collect()
    gc.freeze()


def small(**changes: Any) -> TinyPipeline:
    return few_tokens(tiny_pipelines.wan(**changes), "wan")


@pytest.fixture
def wan() -> Iterator[TinyPipeline]:
    tiny = small()
    yield tiny
    tiny.pipe.transformer.reset_attention_backend()


@pytest.mark.parametrize("backend", ["rain_fusion_attn", "block_sparse_attn"])
def test_a_registered_name_runs_sparse_in_the_right_steps(wan: TinyPipeline, backend: str) -> None:
    # of fewer blocks one of the backends drops none
    wan.arguments |= SIZE
    native = wan.run(3)
    with ditattn.install(wan.pipe, backend, **SPARSE):
        expected = wan.run(3)
    with ditattn.register(**SPARSE) as registration:
        wan.pipe.transformer.set_attention_backend(backend)
        out = wan.run(3)
        wan.pipe.transformer.reset_attention_backend()
    report = registration.report().components["WanTransformer3DModel"]
    assert torch.equal(out, expected)
    assert not torch.equal(out, native)
    # the call carries no step: it is read from the timesteps
    assert report.step_sources == {"timestep": 6}
    assert {step: density is not None for step, density in report.sparse_density_by_step.items()} == {0: False, 1: True, 2: True}
    assert list(report.sparse_density_by_layer) == [0, 1]
    # diffusers' call reaches cross-attention too, which stays dense and is counted as such
    assert report.dense_reasons == {"not self-attention of the denoiser": 12, "first steps": 4}
    assert report.sparse == 8


def test_remove_restores_the_dispatcher_exactly(wan: TinyPipeline) -> None:
    native = wan.run(2)
    before, dispatcher = footprint(wan.pipe), dispatcher_footprint()
    registration = ditattn.register(**SPARSE)
    assert {"rain_fusion_attn", "fa", "torch_sdpa"} <= set(AttentionBackendName.__members__.values())
    wan.pipe.transformer.set_attention_backend("rain_fusion_attn")
    wan.run(2)
    wan.pipe.transformer.reset_attention_backend()
    registration.remove()
    registration.remove()
    assert dispatcher_footprint() == dispatcher
    with pytest.raises(ValueError, match="rain_fusion_attn"):
        wan.pipe.transformer.set_attention_backend("rain_fusion_attn")
    # reset_attention_backend() writes the attribute on every processor, which is diffusers' own doing
    changed = {path for path, part in footprint(wan.pipe).items() if part != before[path]}
    assert changed <= {path for path in before if path.endswith((".attn1", ".attn2"))}
    assert torch.equal(wan.run(2), native)


def test_remove_restores_the_process_wide_backend_that_was_set_before(wan: TinyPipeline) -> None:
    with attention_backend("_native_math"):
        before = _AttentionBackendRegistry._active_backend
        with ditattn.register():
            wan.pipe.transformer.set_attention_backend("rain_fusion_attn")
            assert _AttentionBackendRegistry._active_backend == "rain_fusion_attn"
        assert _AttentionBackendRegistry._active_backend is before


def test_another_model_reached_by_the_process_wide_backend_runs_densely_and_exactly(wan: TinyPipeline) -> None:
    other = few_tokens(tiny_pipelines.flux(), "flux")
    native = other.run(1)
    with ditattn.register(**SPARSE) as registration:
        wan.pipe.transformer.set_attention_backend("rain_fusion_attn")
        torch.testing.assert_close(other.run(1), native, rtol=0, atol=1e-5)
        wan.pipe.transformer.reset_attention_backend()
    assert "FluxTransformer2DModel" not in registration.report().components


def test_a_second_run_begins_at_step_zero(wan: TinyPipeline) -> None:
    with ditattn.register(**SPARSE) as registration:
        wan.pipe.transformer.set_attention_backend("rain_fusion_attn")
        wan.run(2)
        wan.run(2)
        wan.pipe.transformer.reset_attention_backend()
    assert registration.report().components["WanTransformer3DModel"].dense_reasons["first steps"] == 2 * 4


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_run_after_one_that_raised_begins_at_step_zero(wan: TinyPipeline, error: type[BaseException]) -> None:
    calls = iter(range(100))

    def fail_in_step_two(*_: object) -> None:
        if next(calls) == 4:
            raise error

    with ditattn.register(**SPARSE) as registration:
        wan.pipe.transformer.set_attention_backend("rain_fusion_attn")
        with wan.pipe.transformer.blocks[1].register_forward_pre_hook(fail_in_step_two), pytest.raises(error):
            wan.run(3)
        before = registration.report().components["WanTransformer3DModel"]
        wan.run(3)
        wan.pipe.transformer.reset_attention_backend()
    after = registration.report().components["WanTransformer3DModel"]
    assert after.dense_reasons["first steps"] - before.dense_reasons["first steps"] == 4
    assert after.sparse - before.sparse == 8


def test_strict_applies(wan: TinyPipeline) -> None:
    tiny = tiny_pipelines.flux_with_hidden_image_tokens()
    with ditattn.register(strict=True, **SPARSE):
        tiny.pipe.transformer.set_attention_backend("rain_fusion_attn")
        with pytest.raises(DenseInStrictMode, match="mask with gaps"):
            tiny.run(1)
        tiny.pipe.transformer.reset_attention_backend()


def test_one_registration_at_a_time() -> None:
    with ditattn.register():
        before = dispatcher_footprint()
        with pytest.raises(UnsupportedModel, match="registered already"):
            ditattn.register()
        assert dispatcher_footprint() == before
    with ditattn.register():
        pass


def test_a_wrong_key_is_refused_at_once() -> None:
    before = dispatcher_footprint()
    with pytest.raises(UnknownKey, match="did you mean 'sparsity'"):
        ditattn.register(sparcity=0.5)
    assert dispatcher_footprint() == before


# what single modules choose


@pytest.mark.parametrize("chosen", [(0,), (1,), (0, 1)], ids=str)
def test_a_name_that_single_modules_choose_runs_in_them_alone(chosen: tuple[int, ...]) -> None:
    tiny = small()
    dense = ",".join(str(layer) for layer in (0, 1) if layer not in chosen)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE, skip_layers=dense):
        expected = tiny.run(2)
    with ditattn.register(**SPARSE) as registration:
        for layer in chosen:
            tiny.pipe.transformer.blocks[layer].attn1.set_attention_backend("rain_fusion_attn")
        out = tiny.run(2)
    report = registration.report().components["WanTransformer3DModel"]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    assert list(report.sparse_density_by_layer) == list(chosen)
    assert report.dense_reasons == {"first steps": 2 * len(chosen)}
    assert report.sparse == 2 * len(chosen)


def test_each_layer_runs_what_was_chosen_for_it() -> None:
    tiny = small(transformer=transformer(num_layers=4))
    blocks = tiny.pipe.transformer.blocks
    with ditattn.register(**SPARSE) as registration:
        # the fourth keeps its own
        for block, name in zip(blocks, ("rain_fusion_attn", "block_sparse_attn", "torch_sdpa"), strict=False):
            block.attn1.set_attention_backend(name)
        tiny.run(3)
        first = registration.report()
        # the others join in the middle of the registration
        blocks[3].attn1.set_attention_backend("block_sparse_attn")
        tiny.run(3)
    rows = {report.backend: report for report in registration.report().components.values()}
    assert {row.backend for row in first.components.values()} == set(rows) == {"rain_fusion_attn", "block_sparse_attn", "torch_sdpa"}
    assert {name: list(row.sparse_density_by_layer) for name, row in rows.items()} == {
        "rain_fusion_attn": [0],
        "block_sparse_attn": [1, 3],
        "torch_sdpa": [2],
    }
    assert (rows["rain_fusion_attn"].sparse, rows["block_sparse_attn"].sparse, rows["torch_sdpa"].dense) == (8, 12, 12)
    assert rows["rain_fusion_attn"].dense_reasons == {"first steps": 4}


def test_a_layer_that_joins_in_the_middle_of_a_run_is_in_the_step_of_the_run() -> None:
    tiny = small()
    blocks = tiny.pipe.transformer.blocks

    def join(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            blocks[1].attn1.set_attention_backend("block_sparse_attn")
        return values

    with ditattn.register(**SPARSE) as registration:
        blocks[0].attn1.set_attention_backend("rain_fusion_attn")
        tiny.run(4, callback_on_step_end=join)
    rows = {report.backend: report for report in registration.report().components.values()}
    assert list(rows["block_sparse_attn"].sparse_density_by_step) == [2, 3]
    assert rows["block_sparse_attn"].dense == 0


@pytest.mark.parametrize("earlier", [None, "_native_math"])
def test_remove_puts_back_what_modules_had_chosen_before(earlier: str | None) -> None:
    tiny = small()
    attention = tiny.pipe.transformer.blocks[0].attn1
    if earlier is not None:
        attention.set_attention_backend(earlier)
    native, before = tiny.run(1), footprint(tiny.pipe)
    registration = ditattn.register(**SPARSE)
    tiny.pipe.transformer.set_attention_backend("rain_fusion_attn")
    tiny.run(1)
    # a module that never ran, and one that is not a part of any pipeline
    other, twin = small(), copy.deepcopy(tiny.pipe.transformer)
    other.pipe.transformer.blocks[1].attn1.set_attention_backend("block_sparse_attn")
    registration.remove()
    assert footprint(tiny.pipe) == before
    assert torch.equal(tiny.run(1), native)
    assert torch.equal(other.run(1), small().run(1))
    tiny.pipe.transformer = twin
    # the copy did not live when the names were registered: it gets the default
    torch.testing.assert_close(tiny.run(1), native, rtol=0, atol=1e-4)


# models that nobody described, and models that are not reached


def as_if_unlisted(monkeypatch: pytest.MonkeyPatch) -> TinyPipeline:
    monkeypatch.setattr(models, "MODELS", ())
    return small()


def test_an_unlisted_denoiser_is_served_by_rule_as_by_install(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = as_if_unlisted(monkeypatch)
    native = tiny.run(3)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
        expected = tiny.run(3)
    installed = handle.report().components["transformer"]
    assert (installed.sparse, installed.dense_reasons["first steps"]) == (8, 4)
    before = footprint(tiny.pipe)
    with ditattn.register(**SPARSE) as registration:
        tiny.pipe.transformer.set_attention_backend("rain_fusion_attn")
        out = tiny.run(3)
    report = registration.report().components["WanTransformer3DModel"]
    assert report.model == installed.model
    assert "unlisted: by rule: its tokens are a grid of" in report.model
    assert torch.equal(out, expected)
    assert (report.sparse, report.dense_reasons["first steps"]) == (8, 4)
    assert list(report.sparse_density_by_layer) == [0, 1]
    assert footprint(tiny.pipe) == before
    assert torch.equal(tiny.run(3), native)


def test_each_layer_of_an_unlisted_denoiser_runs_what_was_chosen_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = as_if_unlisted(monkeypatch)
    with ditattn.register(**SPARSE) as registration:
        for block, name in zip(tiny.pipe.transformer.blocks, ("rain_fusion_attn", "block_sparse_attn"), strict=True):
            block.attn1.set_attention_backend(name)
        tiny.run(2)
    rows = {report.backend: report for report in registration.report().components.values()}
    assert {name: list(row.sparse_density_by_layer) for name, row in rows.items()} == {"rain_fusion_attn": [0], "block_sparse_attn": [1]}
    assert all(row.sparse == 2 and "in raster order, as dry runs showed" in row.model for row in rows.values())


def test_strict_refuses_an_unlisted_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = as_if_unlisted(monkeypatch)
    with ditattn.register(strict=True, **SPARSE):
        tiny.pipe.transformer.set_attention_backend("rain_fusion_attn")
        with pytest.raises(
            UnsupportedModel, match="WanTransformer3DModel is not a known model family: without strict it is served by rule"
        ):
            tiny.run(1)


def test_what_is_not_served_says_why_and_runs_as_before(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tiny = as_if_unlisted(monkeypatch)
    monkeypatch.setattr(models, "NOT_SERVED", {"WanTransformer3DModel": "its tokens are letters"})
    native = tiny.run(1)
    with caplog.at_level(logging.WARNING, logger="ditattn"), ditattn.register(**SPARSE) as registration:
        tiny.pipe.transformer.set_attention_backend("rain_fusion_attn")
        torch.testing.assert_close(tiny.run(1), native, rtol=0, atol=1e-5)
    said = "WanTransformer3DModel is not served: its tokens are letters, so its attention runs densely, by torch's SDPA"
    assert said in registration.report().not_served["WanTransformer3DModel"]
    assert caplog.text.count(said) == 1
    assert registration.report().components == {}
    with ditattn.register(strict=True, **SPARSE):
        tiny.pipe.transformer.set_attention_backend("rain_fusion_attn")
        with pytest.raises(UnsupportedModel, match="its tokens are letters"):
            tiny.run(1)


@pytest.mark.parametrize("listed", [True, False], ids=["known", "unlisted"])
def test_a_model_that_calls_sdpa_itself_is_told_to_be_out_of_reach(
    listed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = few_tokens(tiny_pipelines.cogvideox(), "cogvideox")
    if not listed:
        monkeypatch.setattr(models, "MODELS", ())
    native = tiny.run(1)
    with caplog.at_level(logging.WARNING, logger="ditattn"), ditattn.register(**SPARSE) as registration:
        assert torch.equal(tiny.run(1), native)
        assert not registration.report().not_served, "nobody asked"
        tiny.pipe.transformer.set_attention_backend("rain_fusion_attn")
        assert torch.equal(tiny.run(2), tiny.run(2))
    said = "which set_attention_backend does not reach, so its attention stays as it was; ditattn.install serves it"
    assert said in registration.report().not_served["CogVideoXTransformer3DModel"]
    assert caplog.text.count(said) == 1


# every family

SLOW = (VIDEOS.keys() | IMAGES.keys()) - QUICK
# their processors call torch's SDPA themselves
UNREACHED = {
    "cogvideox, DPM",
    "cogvideox, DDIM",
    "cosmos",
    "mochi",
    "allegro",
    "easyanimate",
    "consisid",
    "stable diffusion 3",
    "aura flow",
    "cogview 4",
    "cogview 3 plus",
    "lumina 2",
    "hidream",
    "pixart",
    "hunyuan dit",
    "lumina next",
}
# each of the two counts the steps of its own
OWN_COUNTS = {"wan, two transformers"}


def of_families(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names])


def built(name: str) -> TinyPipeline:
    if version.parse(CASES[name].since) > DIFFUSERS:
        pytest.skip(f"diffusers {DIFFUSERS} does not have it: since {CASES[name].since}")
    return CASES[name].build()


@pytest.mark.shows("register")
@of_families(name for name in CASES if name not in UNREACHED | OWN_COUNTS)
def test_a_registered_name_runs_what_install_runs(name: str) -> None:
    """A dense step and a sparse one: even where the second of two hardly moves the latents, its bits are there."""
    tiny = built(name)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE):
        expected = tiny.run(2)
    with ditattn.register(**SPARSE) as registration:
        for denoiser in denoisers(tiny.pipe).values():
            denoiser.set_attention_backend("rain_fusion_attn")
        assert torch.equal(tiny.run(2), expected)
    assert registration.report().components
    for component in registration.report().components.values():
        assert {step: density is not None for step, density in component.sparse_density_by_step.items()} == {0: False, 1: True}


@pytest.mark.shows("register", says="no: calls SDPA")
@of_families(sorted(UNREACHED))
def test_a_family_that_calls_sdpa_itself_is_out_of_reach(name: str) -> None:
    tiny = built(name)
    with ditattn.install(tiny.pipe, "torch_sdpa") as handle:
        assert torch.isfinite(tiny.run(1)).all()
    (cls,) = {component.model for component in handle.report().components.values()}
    with ditattn.register(**SPARSE) as registration:
        for denoiser in denoisers(tiny.pipe).values():
            denoiser.set_attention_backend("rain_fusion_attn")
        tiny.run(1)
    assert "which set_attention_backend does not reach" in registration.report().not_served[cls]
    assert registration.report().components == {}
