"""What `--attention-backend` and `--attention-backend-config` ask of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import create_model

from ditattn.backends.config import AttentionConfig
from ditattn.backends.registry import load_backend
from ditattn.backends.setting import Setting
from ditattn.errors import ConfigError

__all__ = ["NAMES", "asks_for_ours", "global_keys", "model_prefix", "parse_setting", "pipeline_config"]

NAMES = ("laser_attn", "block_sparse_attn", "rain_fusion_attn")
"""Names that sglang's `--attention-backend` takes on every device and that are ours as well."""

# the key that names the backend to serve, where it is not the one that `--attention-backend` names: sglang has no member for all of ours
BACKEND_KEY = "backend"


def global_keys() -> dict[str, Any]:
    """`--attention-backend-config` of this process; empty before sglang has read its arguments."""
    return dict(getattr(_server_args(), "attention_backend_config", None) or {})


def model_prefix() -> str:
    """What sglang's configuration calls the denoiser, in lower case; empty where it does not."""
    return str(getattr(getattr(pipeline_config(), "dit_config", None), "prefix", "")).lower()


def pipeline_config() -> Any:
    """sglang's configuration of the pipeline; None before it has read its arguments."""
    return getattr(_server_args(), "pipeline_config", None)


def _server_args() -> Any:
    from sglang.multimodal_gen.runtime.server_args import get_global_server_args

    try:
        return get_global_server_args()
    except ValueError:
        return None


def asks_for_ours(keys: Mapping[str, Any]) -> bool:
    """True where the configuration names a backend of this package, which sglang's own do not understand."""
    return keys.get(BACKEND_KEY) is not None


def parse_setting(name: str, keys: Mapping[str, Any]) -> Setting:
    """The setting that serves a name.

    Args:
        name: one of NAMES.
        keys: of `--attention-backend-config`: those of the backend that serves, and `backend`, which names it. Without `backend`, what is
            not given is what sglang documents for these names: sparsity 0.2 after ten dense steps (`preset=ascend`). With it, our defaults.

    Raises:
        UnknownBackend, UnknownKey, ConfigError, BackendUnavailable: as `Setting.parse`; a sparse backend under `laser_attn`.
    """
    named = keys.get(BACKEND_KEY)
    backend = load_backend(name if named is None else str(named))
    if backend.is_sparse and not load_backend(name).is_sparse:
        raise ConfigError(
            f"{BACKEND_KEY}={backend.name} under --attention-backend {name}: sglang builds no metadata of steps for that name; "
            f"ask for it under rain_fusion_attn"
        )
    try:
        _with_backend_key(backend.get_config_cls()).from_mapping(keys)
    except ConfigError as error:
        raise type(error)(f"--attention-backend-config of {backend.name}: {error}") from None
    own = {key: value for key, value in keys.items() if key != BACKEND_KEY}
    if named is None and backend.is_sparse:
        own = {"preset": "ascend", **own}
    return Setting.parse(backend.name, own)


def _with_backend_key(config_cls: type[AttentionConfig]) -> type[AttentionConfig]:
    """The backend's keys and ours, so that the error about a wrong key knows all of them."""
    made: type[AttentionConfig] = create_model(config_cls.__name__, __base__=config_cls, **{BACKEND_KEY: (str | None, None)})  # type: ignore[call-overload]
    return made
