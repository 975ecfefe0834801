"""What is compared: settings of the attention, and the clips they are compared on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from ditattn.backends.registry import DEFAULT_BACKEND, load_backend
from ditattn.backends.setting import Setting, StepCache
from ditattn.errors import ConfigError
from ditattn.quantization.request import Quantization

__all__ = ["REFERENCE", "REFERENCE_NAME", "Clip", "dropped_keys", "expand", "setting_label", "setting_names", "with_step_caches"]


@dataclass(frozen=True)
class Clip:
    """One thing to make with every setting."""

    prompt: str
    seed: int


REFERENCE = Setting.parse(DEFAULT_BACKEND)
REFERENCE_NAME = f"{DEFAULT_BACKEND} (reference)"


def expand(
    backends: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
    grid: Mapping[str, Sequence[Any]],
    components: Mapping[str, str] | None = None,
    quantizations: Sequence[Quantization | None] = (None,),
) -> list[Setting]:
    """Every backend with every configuration, every point of the grid and every quantisation; repetitions are dropped.

    Args:
        backends: names.
        configs: configurations; none means one without keys.
        grid: values by key.
        components: other backends for single components, in every setting.
        quantizations: of the linear layers; None is none. The reference itself is no setting where there are several.

    A backend goes without the keys that only others of `backends` have, see `dropped_keys`.

    Raises:
        ConfigError: a key that a configuration and the grid both set; or as `Setting.parse`.
    """
    settings: list[Setting] = []
    for backend, config, quantization in product(backends, configs or [{}], quantizations):
        if both := sorted(set(config) & set(grid)):
            raise ConfigError(f"{', '.join(both)} is set by --attention-backend-config and by --grid: name it in one of them")
        dropped = dropped_keys(backend, (*config, *grid), backends)
        for point in product(*grid.values()):
            keys = {**config, **dict(zip(grid, point, strict=True))}
            setting = Setting.parse(backend, {key: value for key, value in keys.items() if key not in dropped}, components, quantization)
            if setting not in settings and (len(quantizations) == 1 or setting != REFERENCE):
                settings.append(setting)
    return settings


def with_step_caches(settings: Sequence[Setting], caches: Sequence[StepCache]) -> list[Setting]:
    """The caches alone, then every setting without and with each of them; the reference itself is none of them."""
    if not caches:
        return list(settings)
    beside = [replace(setting, step_cache=cache) for setting in (REFERENCE, *settings) for cache in (None, *caches)]
    return [setting for n, setting in enumerate(beside) if setting != REFERENCE and setting not in beside[:n]]


def dropped_keys(backend: str, keys: Iterable[str], backends: Iterable[str]) -> list[str]:
    """Those of `keys` that another one of `backends` has and this one does not. What nobody has stays, to be refused."""
    own, others = _keys_of(backend), {key for other in backends for key in _keys_of(other)}
    return [key for key in dict.fromkeys(keys) if key in others and key not in own]


def _keys_of(backend: str) -> frozenset[str]:
    return frozenset(load_backend(backend).get_config_cls().model_fields)


def setting_names(settings: Sequence[Setting]) -> list[str]:
    """Names for tables and plots: the backend and the keys in which a setting differs from another one of that backend (all of them where
    none does), the quantisation, the step cache and the keys in which it differs from others of its name."""
    return [_name(setting, settings) for setting in settings]


def _name(setting: Setting, settings: Sequence[Setting]) -> str:
    same = [other.keys for other in settings if other.backend == setting.backend]
    keys = _differing(setting.keys, same) if any(other != setting.keys for other in same) else list(setting.keys)
    quantized = "" if setting.quantization is None else f" + {setting.quantization.name}"
    return f"{setting.backend} {_values(setting.keys, keys)}".strip() + quantized + _cache_name(setting.step_cache, settings)


def _cache_name(cache: StepCache | None, settings: Sequence[Setting]) -> str:
    if cache is None:
        return ""
    same = [other.step_cache.keys for other in settings if other.step_cache is not None and other.step_cache.name == cache.name]
    return f" + {cache.name} {_values(cache.keys, _differing(cache.keys, same))}".rstrip()


def _differing(keys: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in keys if any(other.get(key) != keys[key] for other in others)]


def _values(keys: Mapping[str, Any], shown: Iterable[str]) -> str:
    return ",".join(f"{key}={keys[key]}" for key in shown)


def setting_label(name: str) -> str:
    """What stands in a name of `setting_names` behind the backend, in words: "sparsity 0.5"; empty where nothing does."""
    return name.partition(" ")[2].replace("=", " ").replace(",", ", ")
