"""Models that users changed: subclasses of known transformers, attention processors of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ditattn
import tiny_pipelines
from tiny_pipelines import FAMILIES

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
    tiny = FAMILIES[name]()
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
    tiny = tiny_pipelines.wan()
    _turned_into(tiny.pipe.transformer)
    with ditattn.register(**SPARSE) as registration:
        tiny.pipe.transformer.set_attention_backend("rain_fusion_attn")
        tiny.run(1)
        tiny.pipe.transformer.reset_attention_backend()
    assert registration.report().components["Mine"].sparse > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_subclass_whose_forward_takes_anything_is_read_by_its_keywords(name: str) -> None:
    tiny = FAMILIES[name]()
    forward = type(tiny.pipe.transformer).forward
    # diffusers asks for parameters by name in some pipelines
    _turned_into(tiny.pipe.transformer, forward=lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    with ditattn.install(tiny.pipe, "rain_fusion_attn", strict=True, **SPARSE) as handle:
        tiny.run(1)
    assert handle.report().components["transformer"].sparse > 0


def test_a_subclass_with_arguments_of_its_own_runs_densely_and_says_so() -> None:
    tiny = tiny_pipelines.wan()
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
