"""The step caches of a verb: those named on the command line, else those that the files of its settings were tuned beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditattn.backends.setting import StepCache, split_step_cache
from ditattn.cli.job import Job
from ditattn.cli.settings import CompareSettings, GenerateSettings, TuneSettings
from ditattn.cli.terminal import say
from ditattn.errors import ConfigError

__all__ = ["cache_names", "check_cache_config", "compared_step_caches", "one_step_cache"]


def cache_names(settings: CompareSettings | GenerateSettings | TuneSettings) -> list[str]:
    """What --cache names, without "none", which is none."""
    names = [settings.cache] if isinstance(settings.cache, str) else settings.cache or []
    return [name for name in dict.fromkeys(names) if name.lower() != "none"]


def check_cache_config(settings: CompareSettings | GenerateSettings | TuneSettings) -> None:
    """Raise ConfigError if there are keys and no cache."""
    if settings.cache_config and not cache_names(settings):
        raise ConfigError("--cache-config is for a step cache: name it with --cache")


def one_step_cache(settings: GenerateSettings | TuneSettings, job: Job) -> StepCache | None:
    """The step cache of every run, checked as far as possible without weights.

    Raises:
        ConfigError, UnknownKey: no such cache or key, a value of another type, or keys of no cache.
        UnsupportedModel: the pipeline does not tell what the cache must know.
    """
    from ditattn.hosts.diffusers.step_cache import parse_step_cache

    check_cache_config(settings)
    tuned = _tuned_beside([settings.attention_backend_config])
    asked = [StepCache(name, settings.cache_config) for name in cache_names(settings)]
    found = [parse_step_cache(cache.name, cache.keys) for cache in (tuned if settings.cache is None else asked)]
    _check_pipeline(found, job)
    _tell(tuned, found, by_file=settings.cache is None)
    return found[0] if found else None


def compared_step_caches(settings: CompareSettings, job: Job) -> list[StepCache]:
    """The step caches to compare. Raises as `one_step_cache`."""
    from ditattn.hosts.diffusers.step_cache import expand_step_caches, parse_step_cache

    tuned, names = _tuned_beside(settings.attention_backend_config), cache_names(settings)
    if settings.cache:
        found = expand_step_caches(names, settings.cache_config)
    else:
        found = [parse_step_cache(cache.name, cache.keys) for cache in tuned]
    keys = dict.fromkeys(key for config in settings.cache_config for key in config)
    for name in names:
        if dropped := [key for key in keys if not any(key in cache.keys for cache in found if cache.name == name)]:
            say(f"{name} has no {', '.join(dropped)}: it is compared without")
    _check_pipeline(found, job)
    _tell(tuned, found, by_file=not settings.cache)
    return found


def _tuned_beside(configs: Sequence[Mapping[str, Any]]) -> list[StepCache]:
    found = [split_step_cache(config)[1] for config in configs]
    return [cache for number, cache in enumerate(found) if cache is not None and cache not in found[:number]]


def _check_pipeline(caches: Sequence[StepCache], job: Job) -> None:
    from ditattn.hosts.diffusers.step_cache import check_pipeline

    for cache in caches:
        if job.model.pipeline_cls is not None:
            check_pipeline(job.model.pipeline_cls, cache)


def _tell(tuned: Sequence[StepCache], used: Sequence[StepCache], *, by_file: bool) -> None:
    """What the files say and what becomes of it."""
    for cache in tuned:
        if by_file:
            say(f"step cache {cache.words}: the configuration was tuned beside it; --cache none leaves it off")
        elif cache.words not in [one.words for one in used]:
            instead = ", ".join(one.words for one in used) or "none"
            say(f"the configuration was tuned beside the step cache {cache.words}; --cache asks for {instead}")
