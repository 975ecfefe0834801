"""Step caches of diffusers by name: they skip layers in steps that change little, where a sparse backend makes the rest cheaper."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, get_type_hints

import diffusers
from pydantic import ConfigDict, ValidationError, create_model
from torch import nn

from ditattn.backends.setting import StepCache
from ditattn.errors import ConfigError, UnknownKey, UnsupportedModel
from ditattn.hosts.diffusers.install import denoisers
from ditattn.models import unwrapped
from ditattn.values import sentences, unknown_key

__all__ = ["STEP_CACHES", "add_step_cache", "check_pipeline", "expand_step_caches", "parse_step_cache"]

STEP_CACHES = {
    "first_block": "FirstBlockCacheConfig",
    "pyramid_attention_broadcast": "PyramidAttentionBroadcastConfig",
    "faster": "FasterCacheConfig",
    "mag": "MagCacheConfig",
    "taylorseer": "TaylorSeerCacheConfig",
    "sea": "SeaCacheConfig",
}
"""Names as users write them, and the class of diffusers that holds the keys of each."""

# what each keeps, it keeps for every branch, and the pipeline must say which one runs
_NEEDS_BRANCHES = frozenset({"first_block", "taylorseer", "sea"})


def parse_step_cache(name: str, keys: Mapping[str, Any]) -> StepCache:
    """A cache by name, with keys of diffusers' configuration of it.

    Raises:
        ConfigError: no such cache, this diffusers does not have it, a value has another type than in diffusers' configuration, or `mag`
            lacks the ratios of the model.
        UnknownKey: no such key, or one that takes a function, which is set here.
    """
    known = _known_keys(name)
    for key in keys:
        if key not in known:
            raise UnknownKey(f"the step cache {name}: {unknown_key(key, known)}")
    if name == "mag" and "mag_ratios" not in keys and not keys.get("calibrate"):
        raise ConfigError("the step cache mag needs mag_ratios, which depend on model and steps: a run with calibrate=true prints them")
    return StepCache(name, _typed(name, keys))


def _typed(name: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The values in the types of diffusers' configuration, which itself takes any and fails in the middle of a run.

    Ranges are pairs there, which a file or JSON text can only write as lists.
    """
    types = get_type_hints(_config_cls(name))
    allowed = ConfigDict(arbitrary_types_allowed=True)
    checked = create_model(name, __config__=allowed, **{key: (types[key], ...) for key in keys})  # type: ignore[call-overload]
    try:
        return dict(checked(**keys))
    except ValidationError as error:
        raise ConfigError(f"the step cache {name}: {'; '.join(sentences(error, checked))}") from None


def expand_step_caches(names: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[StepCache]:
    """Every cache with every configuration, without the keys that only another one of `names` has; repetitions are dropped.

    Raises:
        ConfigError, UnknownKey: as `parse_step_cache`.
    """
    known = {name: _known_keys(name) for name in names}
    caches: list[StepCache] = []
    for name, config in product(known, configs or [{}]):
        others = {key for other in known if other != name for key in known[other]}
        cache = parse_step_cache(name, {key: value for key, value in config.items() if key in known[name] or key not in others})
        if cache not in caches:
            caches.append(cache)
    return caches


def _known_keys(name: str) -> list[str]:
    """Those of a cache that a user may set. Raises as `parse_step_cache`."""
    if name not in STEP_CACHES:
        raise ConfigError(f"no step cache {name!r}; there is {', '.join(STEP_CACHES)}")
    if not hasattr(diffusers, STEP_CACHES[name]):
        there = ", ".join(name for name, cls in STEP_CACHES.items() if hasattr(diffusers, cls))
        raise ConfigError(f"diffusers {diffusers.__version__} has no {STEP_CACHES[name]}; of the step caches it has {there}")
    return [one.name for one in dataclasses.fields(_config_cls(name)) if not one.name.endswith("callback")]


def _config_cls(name: str) -> Any:
    return getattr(diffusers, STEP_CACHES[name])


def add_step_cache(pipe: Any, cache: StepCache, num_steps: int | None) -> Callable[[], None]:
    """Switch the cache on for every denoiser of a pipeline, with diffusers' own `enable_cache`. Returns what switches it off.

    Args:
        num_steps: of the runs; for caches whose configuration asks for it.

    Raises:
        UnsupportedModel: the model or its pipeline lacks what the cache needs; says what.
        ConfigError: a value that diffusers refuses.
    """
    check_pipeline(type(pipe), cache)
    undo = contextlib.ExitStack()
    with contextlib.ExitStack() as failed:
        failed.callback(undo.close)
        for name, module in denoisers(pipe).items():
            undo.callback(_add_to(unwrapped(module), f"{type(pipe).__name__}.{name}", cache, _keys(pipe, cache, num_steps)))
        failed.pop_all()
    return undo.close


def check_pipeline(pipeline_cls: type, cache: StepCache) -> None:
    """Raise UnsupportedModel if the pipeline does not tell its denoiser what the cache must know."""
    if _wants(cache, "current_timestep_callback") and not hasattr(pipeline_cls, "current_timestep"):
        raise UnsupportedModel(
            f"the step cache {cache.name} asks which timestep runs, and {pipeline_cls.__name__} does not say (no current_timestep)"
        )
    if cache.name in _NEEDS_BRANCHES and not _names_branches(pipeline_cls):
        raise UnsupportedModel(
            f"the step cache {cache.name} keeps something for each branch of guidance, and {pipeline_cls.__name__} does not say which one "
            "runs (no cache_context)"
        )


def _names_branches(pipeline_cls: type) -> bool:
    """True if the pipeline's source uses `cache_context`, or cannot be read."""
    modules = {inspect.getmodule(cls) for cls in pipeline_cls.__mro__ if issubclass(cls, diffusers.DiffusionPipeline)}
    try:
        return any("cache_context(" in inspect.getsource(module) for module in modules if module is not None)
    except OSError:
        return True


def _wants(cache: StepCache, key: str) -> bool:
    return any(one.name == key for one in dataclasses.fields(_config_cls(cache.name)))


def _keys(pipe: Any, cache: StepCache, num_steps: int | None) -> dict[str, Any]:
    """The keys that were given, and those that a pipeline and its call know."""
    keys = dict(cache.keys)
    if _wants(cache, "current_timestep_callback"):
        keys["current_timestep_callback"] = lambda: pipe.current_timestep
    if _wants(cache, "num_inference_steps") and num_steps is not None:
        keys.setdefault("num_inference_steps", num_steps)
    return keys


def _add_to(module: Any, where: str, cache: StepCache, keys: Mapping[str, Any]) -> Callable[[], None]:
    if not hasattr(module, "enable_cache"):
        raise UnsupportedModel(f"{where} is a {type(module).__name__}, which diffusers gives no step caches (no enable_cache)")
    before = _hooks(module)
    try:
        module.enable_cache(_config_cls(cache.name)(**keys))
    except (ValueError, TypeError, IndexError) as error:
        if isinstance(error, IndexError):
            raise UnsupportedModel(f"the step cache {cache.name} needs two or more transformer blocks, and {where} has fewer") from error
        raise ConfigError(f"diffusers does not add the step cache {cache.name} to {where}: {' '.join(str(error).split())}") from error
    if _hooks(module) == before:
        module.disable_cache()
        raise UnsupportedModel(
            f"the step cache {cache.name} found no layer of {where} to work on; its keys that name layers: "
            f"{', '.join(one.name for one in dataclasses.fields(_config_cls(cache.name)) if 'identifiers' in one.name) or 'none'}"
        )
    switch_off: Callable[[], None] = module.disable_cache
    return switch_off


def _hooks(module: nn.Module) -> set[tuple[str, str]]:
    """Path and name of every hook that diffusers has on a model."""
    registries = {path: getattr(part, "_diffusers_hook", None) for path, part in module.named_modules()}
    return {(path, name) for path, registry in registries.items() if registry is not None for name in registry.hooks}
