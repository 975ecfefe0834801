"""Every transformer class of the installed diffusers is served, or listed with the reason why it is not."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil

import diffusers
import pytest
from diffusers import ModelMixin
from diffusers.models import transformers
from packaging import version
from torch import nn

import ditattn
from ditattn import models
from ditattn.errors import UnsupportedModel
from ditattn.models import MODELS, NOT_SERVED

SERVED = {name for family in MODELS for name in family.transformer_classes}


def transformer_classes() -> set[str]:
    """Names of the models that the files of diffusers' folder of transformers define."""
    modules = [importlib.import_module(f"{transformers.__name__}.{file.name}") for file in pkgutil.iter_modules(transformers.__path__)]
    return {
        name
        for module in modules
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, ModelMixin) and cls.__module__ == module.__name__
    }


def test_every_transformer_is_served_or_listed_with_a_reason() -> None:
    found = transformer_classes()
    assert {"WanTransformer3DModel", "SanaTransformer2DModel"} <= found
    assert found - SERVED - set(NOT_SERVED) == set()


def test_no_transformer_is_both_served_and_listed() -> None:
    assert set(NOT_SERVED) & SERVED == set()


@pytest.mark.skipif(version.parse(diffusers.__version__) < version.parse("0.42.1"), reason="an older diffusers has fewer transformers")
def test_what_is_served_or_listed_exists() -> None:
    assert (SERVED | set(NOT_SERVED)) - transformer_classes() == set()


@pytest.mark.parametrize("name", NOT_SERVED)
def test_a_reason_goes_on_after_the_class(name: str) -> None:
    """It is read as "SomeTransformer is not served: <reason>, so its attention stays as it was"."""
    reason = NOT_SERVED[name]
    assert reason[0].islower()
    assert reason[-1].isalnum()
    assert "\n" not in reason


class ListedTransformer(nn.Module):
    """A denoiser that is listed."""


class DerivedTransformer(ListedTransformer):
    """A user's own version of it."""


@pytest.mark.parametrize("cls", [ListedTransformer, DerivedTransformer])
def test_install_says_why(cls: type[nn.Module], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(models, "NOT_SERVED", {"ListedTransformer": "its tokens are letters"})
    said = f"{cls.__name__} is not served: its tokens are letters, so its attention stays as it was"
    with caplog.at_level(logging.WARNING, logger="ditattn"), ditattn.install(cls(), "rain_fusion_attn") as handle:
        assert said in handle.report().not_served[cls.__name__]
    assert said in caplog.text
    with pytest.raises(UnsupportedModel, match="its tokens are letters"):
        ditattn.install(cls(), "rain_fusion_attn", strict=True)
