"""What is asked of the attention of a pipeline, of its linear layers and of its steps: one value, parsed and checked once.

It goes from the command line or a host down to the stage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ditattn.arguments import described
from ditattn.backends.base import AttentionBackend
from ditattn.backends.config import STEP_CACHE_KEY, AttentionConfig
from ditattn.backends.registry import load_backend, parse_backend_name
from ditattn.backends.selector import unnamed_backend
from ditattn.errors import ConfigError
from ditattn.quantization.request import Quantization

__all__ = ["Setting", "StepCache", "split_step_cache"]


@dataclass(frozen=True)
class StepCache:
    """A step cache of the host, which skips layers in steps that change little. The host checks name and keys.

    Attributes:
        name: the host's for it, such as "first_block".
        keys: of its configuration that were given.
    """

    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """For people: "first_block threshold=0.1"."""
        return f"{self.name} {', '.join(f'{key}={value}' for key, value in self.as_dict()['keys'].items())}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """As values that JSON and YAML have, so without tuples; `split_step_cache` reads it."""
        return {"name": self.name, "keys": {key: list(value) if isinstance(value, tuple) else value for key, value in self.keys.items()}}


def split_step_cache(keys: Mapping[str, Any]) -> tuple[dict[str, Any], StepCache | None]:
    """The keys of the attention, and the step cache that they were tuned beside, where `tune` has written one among them.

    Raises:
        ConfigError: `step_cache` is not what `tune` writes.
    """
    own = {key: value for key, value in keys.items() if key != STEP_CACHE_KEY}
    if STEP_CACHE_KEY not in keys:
        return own, None
    cache = keys[STEP_CACHE_KEY]
    if not isinstance(cache, Mapping) or set(cache) - {"name", "keys"} or not isinstance(cache.get("name"), str):
        raise ConfigError(f"{STEP_CACHE_KEY} must be {{'name': 'first_block', 'keys': {{'threshold': 0.1}}}}, not {described(cache)}")
    if not isinstance(cache.get("keys", {}), Mapping):
        raise ConfigError(f"{STEP_CACHE_KEY}: its keys must be a mapping such as {{'threshold': 0.1}}, not {described(cache['keys'])}")
    return own, StepCache(cache["name"], dict(cache.get("keys", {})))


@dataclass(frozen=True)
class Setting:
    """A backend for the pipeline, its configuration, and other backends for single components. Made by `parse`.

    Attributes:
        backend: the pipeline's backend; None if nobody named one.
        config_owner: the backend that `config` belongs to: the pipeline's, else the one that the components name, else the one that
            serves where nobody names a backend.
        config: its configuration. A component with another backend runs with that one's defaults.
        components: names of backends by component.
        quantization: of the linear layers; None leaves them as they are. `install` does not look at it.
        step_cache: beside the attention; None lets every step run in full. `install` warns where none is on.
    """

    backend: str | None
    config_owner: str
    config: AttentionConfig
    components: Mapping[str, str] = field(default_factory=dict)
    quantization: Quantization | None = None
    step_cache: StepCache | None = None

    @classmethod
    def parse(
        cls,
        backend: str | None = None,
        keys: Mapping[str, Any] | None = None,
        components: Mapping[str, str | None] | None = None,
        quantization: Quantization | None = None,
    ) -> Setting:
        """Check names, keys and ranges.

        Args:
            backend: a backend's name in any case, or None.
            keys: of the configuration, such as {"sparsity": 0.5}.
            components: backends by component; None for one means the pipeline's.
            quantization: of the linear layers, parsed.

        Raises:
            UnknownBackend: a name that is no backend.
            UnknownKey, ConfigError: a key that the backend does not have, a value outside its range, keys of nobody knows whom,
                or components that are no mapping.
            BackendUnavailable: the package that brings the backend cannot be imported.
        """
        if components is not None and not isinstance(components, Mapping):
            raise ConfigError(f"components must be a mapping such as {{'transformer_2': 'torch_sdpa'}}, not {described(components)}")
        named = {component: parse_backend_name(name) for component, name in (components or {}).items() if name is not None}
        pipeline = None if backend is None else parse_backend_name(backend)
        owner = _config_owner(pipeline, set(named.values()), keys or {})
        return cls(pipeline, owner, _parse_config(owner, keys or {}), named, quantization)

    @property
    def keys(self) -> dict[str, Any]:
        """The keys that were given, checked, as plain values; `parse` takes them back."""
        return self.config.model_dump(exclude_unset=True)

    def with_keys(self, **keys: Any) -> Setting:
        """The same with other values of some keys. Raises as `parse`."""
        return replace(self, config=_parse_config(self.config_owner, {**self.keys, **keys}))

    def config_of(self, backend: type[AttentionBackend]) -> AttentionConfig:
        """The configuration of a component that `backend` serves."""
        return self.config if backend.name == self.config_owner else _parse_config(backend.name, {})


def _config_owner(pipeline: str | None, named: Collection[str], keys: Mapping[str, Any]) -> str:
    if pipeline is not None:
        return pipeline
    if len(named) == 1:
        return next(iter(named))
    if keys and named:
        names = ", ".join(sorted(named))
        raise ConfigError(f"{', '.join(keys)}: which backend is this for? The components name {names}; name the pipeline's backend as well")
    return unnamed_backend()


def _parse_config(backend: str, keys: Mapping[str, Any]) -> AttentionConfig:
    try:
        return load_backend(backend).get_config_cls().from_mapping(keys)
    except ConfigError as error:
        raise type(error)(f"{backend}: {error}") from None
