"""What is compared: settings of the attention, and the clips they are compared on."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ditattn.errors import ConfigError

__all__ = ["REFERENCE", "Clip", "Setting", "expand", "foreign_keys", "name_settings"]


@dataclass(frozen=True)
class Clip:
    """One thing to make with every setting."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Setting:
    """A backend and its configuration.

    Attributes:
        backend: its name.
        config: keys of its configuration.
        components: other backends for single denoisers.
        name: short and unlike that of its neighbours, for tables and plots.
    """

    backend: str
    config: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, str] = field(default_factory=dict)
    name: str = ""


REFERENCE = Setting("torch_sdpa", name="torch_sdpa (reference)")


def expand(
    backends: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
    grid: Mapping[str, Sequence[Any]],
    known: Mapping[str, Collection[str]] | None = None,
) -> list[Setting]:
    """Every backend with every configuration and every point of the grid; repetitions are dropped.

    Args:
        backends: names.
        configs: configurations; none means one without keys.
        grid: values by key.
        known: by backend, the keys that it understands: it is spared those that only others of `backends` understand. None spares nobody.

    Raises:
        ConfigError: a key that a configuration and the grid both set.
    """
    settings = []
    for backend, config in product(backends, configs or [{}]):
        if both := sorted(set(config) & set(grid)):
            raise ConfigError(f"{', '.join(both)} is set by --attention-backend-config and by --grid: name it in one of them")
        foreign = foreign_keys(backend, (*config, *grid), known or {})
        for point in product(*grid.values()):
            values = {**config, **dict(zip(grid, point, strict=True))}
            setting = Setting(backend, {key: value for key, value in values.items() if key not in foreign})
            if setting not in settings:
                settings.append(setting)
    return name_settings(settings)


def foreign_keys(backend: str, keys: Iterable[str], known: Mapping[str, Collection[str]]) -> list[str]:
    """Those of `keys` that another backend of `known` understands and this one does not."""
    own, others = known.get(backend, ()), {key for name, theirs in known.items() if name != backend for key in theirs}
    return [key for key in dict.fromkeys(keys) if key in others and key not in own]


def name_settings(settings: Sequence[Setting]) -> list[Setting]:
    """The settings, each named by its backend and by the keys in which it differs from another setting of that backend."""
    named = []
    for setting in settings:
        same = [other.config for other in settings if other.backend == setting.backend]
        keys = [key for key in setting.config if len(same) == 1 or any(other.get(key) != setting.config[key] for other in same)]
        values = ",".join(f"{key}={setting.config[key]}" for key in keys)
        named.append(Setting(setting.backend, setting.config, setting.components, f"{setting.backend} {values}".strip()))
    return named
