"""What is compared: settings of the attention, and the clips they are compared on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ditattn.backends.registry import DEFAULT_BACKEND, load_backend
from ditattn.backends.setting import Setting
from ditattn.errors import ConfigError
from ditattn.quantization.request import Quantization

__all__ = ["REFERENCE", "REFERENCE_NAME", "Clip", "dropped_keys", "expand", "setting_label", "setting_names"]


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


def dropped_keys(backend: str, keys: Iterable[str], backends: Iterable[str]) -> list[str]:
    """Those of `keys` that another one of `backends` has and this one does not. What nobody has stays, to be refused."""
    own, others = _keys_of(backend), {key for other in backends for key in _keys_of(other)}
    return [key for key in dict.fromkeys(keys) if key in others and key not in own]


def _keys_of(backend: str) -> frozenset[str]:
    return frozenset(load_backend(backend).get_config_cls().model_fields)


def setting_names(settings: Sequence[Setting]) -> list[str]:
    """Names for tables and plots: the backend, the keys in which a setting differs from another one of that backend, the quantisation."""
    return [_name(setting, [other for other in settings if other.backend == setting.backend]) for setting in settings]


def _name(setting: Setting, same: Sequence[Setting]) -> str:
    keys = [key for key in setting.keys if len(same) == 1 or any(other.keys.get(key) != setting.keys[key] for other in same)]
    values = ",".join(f"{key}={setting.keys[key]}" for key in keys)
    quantized = "" if setting.quantization is None else f" + {setting.quantization.name}"
    return f"{setting.backend} {values}".strip() + quantized


def setting_label(name: str) -> str:
    """What stands in a name of `setting_names` behind the backend, in words: "sparsity 0.5"; empty where nothing does."""
    return name.partition(" ")[2].replace("=", " ").replace(",", ", ")
