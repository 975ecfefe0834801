"""vllm-omni: one of our sparse backends where its diffusion attention is asked for RAINFUSION_ATTN.

vllm-omni calls `register` in each of its processes, by the entry point group `vllm_omni.general_plugins`. It does nothing unless the
environment asks for it. `vllm_omni` is imported inside functions alone. Source: vllm_omni 0.30.0, diffusion/attention.
"""

from __future__ import annotations

import atexit
import os
from typing import Any

from ditattn.errors import BackendUnavailable
from ditattn.hosts.vllm_omni.block_sparse import BlockSparseKeys, config_of
from ditattn.hosts.vllm_omni.classes import host_backend
from ditattn.hosts.vllm_omni.environment import KEYS, SLOT, SWITCH, asked_backend, further_keys
from ditattn.hosts.vllm_omni.layer import Layer
from ditattn.hosts.vllm_omni.run import Run, logger, run_of_process
from ditattn.hosts.vllm_omni.tokens import Tokens

__all__ = ["BlockSparseKeys", "Layer", "Run", "Tokens", "register"]

CLASS_NAME = "DitattnBackend"


def register() -> None:
    """Put a backend of ours in the place of RAINFUSION_ATTN in this process, if the environment asks for it. May be called again.

    `DITATTN_VLLM_OMNI` is a sparse backend's name, or 1 for the recommended one; `DITATTN_VLLM_OMNI_CONFIG` holds keys of it that
    vllm-omni has no words for.

    Raises:
        UnknownBackend, ConfigError: what the environment asks for does not exist or cannot be honoured.
        BackendUnavailable: a vllm-omni without that name, or with another plug-in in its place.
    """
    backend = asked_backend(os.environ)
    if backend is None:
        return
    config_of(backend, None, further_keys(os.environ))
    from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum, register_diffusion_backend

    if SLOT not in DiffusionAttentionBackendEnum.__members__:
        raise BackendUnavailable(f"{SWITCH}: this vllm-omni has no attention backend {SLOT}: pip install 'vllm-omni>=0.30'")
    member, path = DiffusionAttentionBackendEnum[SLOT], f"{__name__}.{CLASS_NAME}"
    if member.is_overridden() and member.get_path() != path:
        raise BackendUnavailable(
            f"{SWITCH}: another plug-in put {member.get_path()} in the place of {SLOT}; leave one of the two out (VLLM_PLUGINS)"
        )
    register_diffusion_backend(member, path)
    atexit.unregister(run_of_process().finish)
    atexit.register(run_of_process().finish)
    logger.info("ditattn: %s serves %s (%s)", backend.name, SLOT, SWITCH)


def __getattr__(name: str) -> Any:
    """The class that vllm-omni's registry finds here by its path is made when it asks for it."""
    if name != CLASS_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    backend = asked_backend(os.environ)
    if backend is None:
        raise AttributeError(f"{name} exists where {SWITCH} names a backend")
    return host_backend(backend, os.environ.get(KEYS, ""))
