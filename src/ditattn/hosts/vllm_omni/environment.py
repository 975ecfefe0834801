"""What the environment of a process of vllm-omni asks for: which backend, and its keys that vllm-omni has no words for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.backends.base import AttentionBackend
from ditattn.backends.registry import RECOMMENDED_BACKEND, load_backend, usable_backends
from ditattn.backends.sparse import SparseAttentionImpl
from ditattn.errors import ConfigError, UnknownBackend
from ditattn.values import parse_config

__all__ = ["KEYS", "SLOT", "SWITCH", "asked_backend", "further_keys"]

SWITCH = "DITATTN_VLLM_OMNI"
KEYS = "DITATTN_VLLM_OMNI_CONFIG"
# the backend of vllm-omni in whose place ours comes
SLOT = "RAINFUSION_ATTN"

# keys of ours that block_sparse of vllm-omni says
SAID_BY_THE_HOST = {
    "sparsity": "sparsity",
    "preset": "sparsity and block_sparse.start_step",
    "skip_first_steps": "start_step",
    "skip_last_steps": "end_step",
    "skip_layers": "skip_layers",
}
# the host does not say which request a forward belongs to, so a kept plan or residual might be another video's
NEEDS_THE_REQUEST = ("plan_refresh_steps", "share_plan_between_branches", "residual")


def asked_backend(environment: Mapping[str, str]) -> type[AttentionBackend] | None:
    """The backend that the environment asks for; None if it asks for none.

    Raises:
        UnknownBackend: no backend of that name, or one that is dense: the place that it would take is that of a sparse one.
    """
    value = environment.get(SWITCH, "").strip()
    if value in ("", "0"):
        return None
    try:
        backend = load_backend(RECOMMENDED_BACKEND if value == "1" else value)
    except UnknownBackend as error:
        raise UnknownBackend(f"{SWITCH}={value}: {error}; 1 takes {RECOMMENDED_BACKEND}, 0 none") from None
    if not _is_served(backend):
        names = ", ".join(one.name for one in usable_backends() if _is_served(one))
        raise UnknownBackend(f"{SWITCH}={value}: {SLOT} is vllm-omni's name for a sparse backend with blocks; take one of {names}")
    return backend


def _is_served(backend: type[AttentionBackend]) -> bool:
    return issubclass(backend.get_impl_cls(), SparseAttentionImpl)


def further_keys(environment: Mapping[str, str]) -> dict[str, Any]:
    """Keys of the backend that vllm-omni has no words for.

    Raises:
        ConfigError: a text that cannot be read, a key that `block_sparse` says, or one that asks for what this host does not tell.
    """
    keys = parse_config(environment.get(KEYS, ""))
    for key in keys:
        if key in SAID_BY_THE_HOST:
            raise ConfigError(f"{KEYS}: say {key} in vllm-omni's attention config, as block_sparse.{SAID_BY_THE_HOST[key]}")
        if key in NEEDS_THE_REQUEST and keys[key] is not False:
            raise ConfigError(f"{KEYS}: {key} cannot be honoured: vllm-omni does not say which request a forward belongs to")
    return keys
