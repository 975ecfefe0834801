"""Models that users changed: subclasses of known transformers, attention processors of their own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import ditattn
import tiny_pipelines
from ditattn.errors import UnsupportedModel
from ditattn.hosts.diffusers.install import self_attention_modules
from ditattn.models import family_of
from tiny_pipelines import FAMILIES, TinyPipeline, few_tokens
from tiny_pipelines.footprint import footprint
from tiny_pipelines.wan import transformer

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"sparsity": 0.6, "skip_first_steps": 0, "min_tokens": 0}


# subclasses


def _turned_into(module: nn.Module, **members: Any) -> str:
    """Make a model an instance of a subclass of a subclass of its class. Returns the name of its class before."""
    known = type(module)
    module.__class__ = type("Mine", (type("Ours", (known,), members),), {})
    return known.__name__


@pytest.mark.parametrize("name", FAMILIES)
def test_a_subclass_is_served_as_the_known_class(name: str) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE):
        expected = tiny.run(2)
    known = _turned_into(tiny.pipe.transformer)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
        assert torch.equal(tiny.run(2), expected)
    report = handle.report().components["transformer"]
    assert report.model == f"Mine, served as {known}"
    assert f"Mine, served as {known}" in report.sentence()
    assert report.sparse > 0


def test_a_known_class_needs_no_further_word() -> None:
    with ditattn.install(tiny_pipelines.wan().pipe, "rain_fusion_attn") as handle:
        report = handle.report().components["transformer"]
    assert report.model == "WanTransformer3DModel"
    assert "WanTransformer3DModel" not in report.sentence()


def test_a_registered_name_serves_a_subclass() -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    _turned_into(tiny.pipe.transformer)
    with ditattn.register(**SPARSE) as registration:
        tiny.pipe.transformer.set_attention_backend("rain_fusion_attn")
        tiny.run(1)
        tiny.pipe.transformer.reset_attention_backend()
    assert registration.report().components["Mine"].sparse > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_subclass_whose_forward_takes_anything_is_read_by_its_keywords(name: str) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    forward = type(tiny.pipe.transformer).forward
    # diffusers asks for parameters by name in some pipelines
    _turned_into(tiny.pipe.transformer, forward=lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
        tiny.run(1)
    assert handle.report().components["transformer"].sparse > 0


def test_a_subclass_with_arguments_of_its_own_runs_densely_and_says_so() -> None:
    tiny = few_tokens(tiny_pipelines.wan(), "wan")
    forward = type(tiny.pipe.transformer).forward

    def renamed(self: Any, hidden_states: Any, **rest: Any) -> Any:
        return forward(self, hidden_states=hidden_states[0], **rest)

    tiny.pipe.transformer.register_forward_pre_hook(
        lambda _module, args, rest: (args, {**rest, "hidden_states": [rest["hidden_states"]]}), with_kwargs=True
    )
    _turned_into(tiny.pipe.transformer, forward=renamed)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
        tiny.run(1)
    assert set(handle.report().components["transformer"].dense_reasons) == {"unknown geometry"}


# attention processors of the user's own


class OwnProcessor:
    """As papers' code has them: no attribute that diffusers' dispatcher would read, and no dictionary to put one in."""

    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def _with_own_processors(tiny: TinyPipeline, *layers: int) -> list[str]:
    """Give these layers a processor of the user's own. Returns their paths."""
    modules = self_attention_modules(tiny.pipe.transformer, family_of(tiny.pipe.transformer))
    paths = [list(modules)[layer] for layer in layers]
    for path in paths:
        inner = modules[path].processor
        # the attention module reads the signature to know which arguments to pass
        own = type(
            "OwnProcessor", (OwnProcessor,), {"__slots__": (), "__call__": functools.wraps(type(inner).__call__)(OwnProcessor.__call__)}
        )
        modules[path].processor = own(inner)
    return paths


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_with_a_processor_of_the_users_own_is_left_alone_and_named(name: str) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE, skip_layers="0"):
        expected = tiny.run(2)
    native = tiny.run(2)
    (path,) = _with_own_processors(tiny, 0)
    before = footprint(tiny.pipe)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
        out = tiny.run(2)
    report = handle.report()
    assert list(report.not_served) == [f"transformer: {path}"]
    assert "its processor OwnProcessor" in report.not_served[f"transformer: {path}"]
    assert f"attention (transformer: {path}): not served: its processor OwnProcessor" in report.summary()
    # the number of the other layer stays
    assert list(report.components["transformer"].sparse_density_by_layer) == [1]
    assert report.components["transformer"].dense == 0
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    assert footprint(tiny.pipe) == before
    assert torch.equal(tiny.run(2), native)
    with pytest.raises(UnsupportedModel, match=f"^transformer: {path}: its processor OwnProcessor .*$"):
        ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE)
    assert footprint(tiny.pipe) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_which_no_layer_can_be_served_stays_as_it_was(name: str) -> None:
    tiny = few_tokens(FAMILIES[name](), name)
    native = tiny.run(1)
    paths = _with_own_processors(tiny, 0, 1)
    before = footprint(tiny.pipe)
    with ditattn.install(tiny.pipe, "rain_fusion_attn", **SPARSE) as handle:
        assert footprint(tiny.pipe) == before
        assert torch.equal(tiny.run(1), native)
    assert list(handle.report().not_served) == [f"transformer: {path}" for path in paths]
    assert handle.report().components == {}
    # one reason, one line
    assert len(handle.report().summary().splitlines()) == 1


def test_a_processor_of_the_users_own_that_calls_sdpa_itself_is_served_where_the_family_does_so() -> None:
    tiny = few_tokens(tiny_pipelines.cogvideox(), "cogvideox")

    class Own(type(tiny.pipe.transformer.transformer_blocks[0].attn1.processor)):  # type: ignore[misc]
        pass

    tiny.pipe.transformer.transformer_blocks[0].attn1.processor = Own()
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
        tiny.run(1)
    assert list(handle.report().components["transformer"].sparse_density_by_layer) == [0, 1]


def test_a_function_as_processor_is_left_alone() -> None:
    tiny = few_tokens(tiny_pipelines.cogvideox(), "cogvideox")
    attention = tiny.pipe.transformer.transformer_blocks[0].attn1
    native, inner = tiny.run(1), attention.processor

    def own(attn: Any, hidden_states: Any, encoder_hidden_states: Any, **rest: Any) -> Any:
        return inner(attn, hidden_states, encoder_hidden_states, image_rotary_emb=rest.get("image_rotary_emb"))

    attention.processor = own
    with ditattn.install(tiny.pipe, "torch_sdpa") as handle:
        torch.testing.assert_close(tiny.run(1), native, rtol=0, atol=1e-5)
    assert "own cannot be derived from" in handle.report().not_served["transformer: transformer_blocks.0.attn1"]


@pytest.mark.slow
def test_compiled_layers_count_served_layers_only() -> None:
    settings = {**SPARSE, "skip_layers": "3"}
    cells = []
    for compiled in (False, True):
        tiny = tiny_pipelines.wan(transformer=transformer(num_layers=4))
        _with_own_processors(tiny, 0, 2)
        if compiled:
            tiny.pipe.transformer.compile(backend="eager")
        with ditattn.install(tiny.pipe, "rain_fusion_attn", **settings) as handle:
            tiny.run(2)
        cells.append({key: (cell.sparse, cell.dense) for key, cell in handle._stage.models[0].log.cells.items()})
    assert cells[0] == cells[1]
    assert {layer for _, layer in cells[0]} == {1, 3}
