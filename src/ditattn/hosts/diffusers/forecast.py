"""What would happen to a model if it were served: told by its classes and configuration files, without a weight."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ditattn.backends.base import check_head_size
from ditattn.backends.registry import usable_backends
from ditattn.errors import ModelNotLoaded, UnsupportedHeadSize
from ditattn.hosts.diffusers.geometry import default_tokens
from ditattn.hosts.diffusers.install import names_denoiser, self_attention_modules
from ditattn.hosts.diffusers.load import config_of, pipeline_class, read_index
from ditattn.hosts.diffusers.pipelines import pipelines_by_transformer
from ditattn.models import MODELS, ModelFamily, family_of, known_class, why_not_served
from ditattn.models.unlisted import family_by_rule, patches_of_config

__all__ = ["FamilyEntry", "Forecast", "families", "forecast"]


@dataclass(frozen=True)
class FamilyEntry:
    """A family as this installation has it.

    Attributes:
        family: its name.
        classes: its transformer classes that the installed diffusers has.
        missing: those that it does not have.
        pipelines: pipelines of the installed diffusers that run them.
        backends: names of the backends that make sense for it; which head sizes they take is another question.
        dispatches: False if its calls are taken from torch's SDPA instead of diffusers' dispatcher.
        notes: one sentence, or nothing.
    """

    family: str
    classes: list[str]
    missing: list[str]
    pipelines: list[str]
    backends: list[str]
    dispatches: bool
    notes: str


@dataclass(frozen=True)
class Forecast:
    """What would happen to one denoiser.

    Attributes:
        component: its name in the pipeline, or its class.
        model: its class.
        family: "unlisted: by rule" if it is of none and served all the same; None if it is not served.
        reason: why it would not be served; None if it would.
        layers: paths of its self-attention, in order.
        head_size: D.
        size: height, width and frames that the pipeline makes by default, where that is known.
        num_tokens: of the image or video at that size, text left out.
        backends: by name, None or why that backend cannot serve it.
        notes: what is true of its family.
    """

    component: str
    model: str
    family: str | None
    reason: str | None
    layers: list[str]
    head_size: int | None
    size: dict[str, int]
    num_tokens: int | None
    backends: dict[str, str | None]
    notes: str


def families() -> list[FamilyEntry]:
    """Every family, in the order of the compatibility table."""
    by_transformer = pipelines_by_transformer()

    def entry(family: ModelFamily) -> FamilyEntry:
        here = [name for name in family.transformer_classes if hasattr(diffusers, name)]
        return FamilyEntry(
            family.name,
            here,
            [name for name in family.transformer_classes if name not in here],
            sorted({pipeline for name in here for pipeline in by_transformer.get(name, ())}),
            [backend.name for backend in usable_backends() if family.supported is None or backend.name in family.supported],
            family.dispatches,
            family.notes,
        )

    return [entry(family) for family in MODELS]


def forecast(model: str, revision: str | None = None) -> list[Forecast]:
    """What would happen to the denoisers of a model.

    Args:
        model: a folder that `save_pretrained` wrote (of a pipeline or of a transformer), a hub id, or the name of a pipeline or transformer
            class of diffusers. Of a model on the hub, only `model_index.json` and `config.json` files are downloaded.
        revision: branch, tag or commit of a hub repository.

    Raises:
        ModelNotLoaded: nothing of the kind, or it cannot be read; says what is missing.
    """
    if model.isidentifier() and not Path(model).exists():
        return _of_class(model)
    if (Path(model).expanduser() / "config.json").is_file():
        config = config_of(model, revision=revision)
        return [_of_config(str(config.get("_class_name")), str(config.get("_class_name")), config, None)]
    index = read_index(model, revision)
    names = [name for name, part in index.items() if _is_denoiser(name, part)]
    if not names:
        raise ModelNotLoaded(f"{model} is a {index.get('_class_name')}, which has no component named transformer*")
    configs = {name: config_of(model, name, revision) for name in names}
    vae = config_of(model, "vae", revision) if _is_part(index.get("vae")) else None
    pipeline = pipeline_class(index)
    return [_of_config(name, index[name][1], configs[name], pipeline, vae, str(index["vae"][1]) if vae else None) for name in names]


def _is_part(part: Any) -> bool:
    return isinstance(part, (list, tuple)) and len(part) == 2 and part[1] is not None


def _is_denoiser(name: str, part: Any) -> bool:
    return names_denoiser(name) and _is_part(part)


def _of_class(name: str) -> list[Forecast]:
    """By the defaults of a transformer class, or of those that a pipeline class asks for."""
    if not hasattr(diffusers, name):
        raise ModelNotLoaded(
            f"'{name}' is no class of diffusers {diffusers.__version__}, no folder and no hub id (owner/name); "
            "`ditattn models` lists the classes that are served"
        )
    transformers = [cls for cls, pipelines in pipelines_by_transformer().items() if name in pipelines and hasattr(diffusers, cls)]
    if name.endswith("Pipeline"):
        if not transformers:
            raise ModelNotLoaded(f"{name} has no component named transformer*")
        return [_of_config("transformer", cls, {}, getattr(diffusers, name)) for cls in sorted(transformers)]
    return [_of_config(name, name, {}, None)]


def _of_config(
    component: str,
    cls_name: str,
    config: Mapping[str, Any],
    pipeline: type | None,
    vae_config: Mapping[str, Any] | None = None,
    vae_cls: str | None = None,
) -> Forecast:
    module = _without_weights(cls_name, config)
    family = family_of(module)
    if family is None:
        return _unlisted(component, cls_name, module)
    vae = None if vae_cls is None else _without_weights(vae_cls, vae_config or {})
    size, num_tokens = default_tokens(_pipeline_without_weights(pipeline, module, vae)) if pipeline is not None else ({}, None)
    known = known_class(module)
    return Forecast(
        component,
        cls_name if known == cls_name else f"{cls_name}, served as {known}",
        family.name,
        None,
        list(self_attention_modules(module, family)),
        family.head_size(module.config),
        size,
        num_tokens,
        {backend.name: _why_not(backend, family, module) for backend in usable_backends()},
        family.notes,
    )


def _unlisted(component: str, cls_name: str, module: nn.Module) -> Forecast:
    """Of a model of no family: what the rule does, as far as modules and configuration tell."""
    reason = why_not_served(module)
    try:
        family = None if reason else family_by_rule(module, None)
    except ValueError as error:
        family, reason = None, f"it is of no known family, and {error}"
    if family is None:
        return Forecast(component, cls_name, None, reason, [], None, {}, None, {}, "")
    config = getattr(module, "config", None)
    patch = "".join(f"; its configuration tells a patch of {' x '.join(map(str, one))}" for one in patches_of_config(config))
    return Forecast(
        component,
        cls_name,
        family.name,
        None,
        list(self_attention_modules(module, family)),
        family.head_size(config),
        {},
        None,
        {backend.name: _why_not(backend, family, module) for backend in usable_backends()},
        f"where its tokens stand is seen by dry runs when it first runs, and what cannot be seen runs densely{patch}",
    )


def _why_not(backend: Any, family: ModelFamily, module: Any) -> str | None:
    if family.supported is not None and backend.name not in family.supported:
        return f"{family.name} does not support it"
    try:
        check_head_size(backend.name, family.head_size(getattr(module, "config", None)), backend.head_sizes)
    except UnsupportedHeadSize as error:
        return str(error)
    return None


def _without_weights(cls_name: str, config: Mapping[str, Any]) -> nn.Module:
    """A model of diffusers whose parameters take no memory.

    Raises:
        ModelNotLoaded: diffusers has no such class, or it does not take this configuration.
    """
    cls = getattr(diffusers, cls_name, None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ModelNotLoaded(f"diffusers {diffusers.__version__} has no model class {cls_name}")
    try:
        with torch.device("meta"):
            module: nn.Module = cls.from_config(dict(config))  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ModelNotLoaded(f"{cls_name} does not take this configuration: {' '.join(str(error).split())[:300]}") from error
    return module


def _pipeline_without_weights(pipeline: type, transformer: nn.Module, vae: nn.Module | None) -> Any:
    """The pipeline around them, its other components left out; None if it cannot be made without those."""
    parameters = list(inspect.signature(pipeline.__init__).parameters.values())[1:]  # type: ignore[misc]
    parts: dict[str, Any] = {one.name: None for one in parameters if one.default is inspect.Parameter.empty}
    given = {"transformer": transformer, "vae": vae}
    try:
        return pipeline(**parts | {one.name: given[one.name] for one in parameters if one.name in given})
    except (AttributeError, TypeError, ValueError):
        return None
