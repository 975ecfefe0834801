"""What the widgets of a node offer, and the keys of a configuration from their values."""

from __future__ import annotations

from typing import Any

from ditattn.backends.config import PRESETS
from ditattn.backends.registry import RECOMMENDED_BACKEND, usable_backends
from ditattn.backends.sparse import SparseAttentionImpl

__all__ = ["backend_choices", "keys_of", "preset_choices"]

FROM_THE_PRESET = "preset"


def backend_choices() -> list[str]:
    """Names of the sparse backends, the recommended one first."""
    names = [one.name for one in usable_backends() if issubclass(one.get_impl_cls(), SparseAttentionImpl)]
    return sorted(names, key=lambda name: name != RECOMMENDED_BACKEND)


def preset_choices() -> list[str]:
    """Names of the presets, the default one first."""
    return sorted(PRESETS, key=lambda name: name != "balanced")


def keys_of(preset: str, sparsity: float, dense_steps: str) -> dict[str, Any]:
    """Keys from the widgets of the node.

    Args:
        sparsity: -1 takes the preset's.
        dense_steps: first steps that run densely, "auto", a number, or a share such as "20%"; "preset" takes the preset's.
    """
    keys: dict[str, Any] = {"preset": preset}
    if sparsity != -1:
        keys["sparsity"] = round(sparsity, 4)
    if dense_steps.strip() != FROM_THE_PRESET:
        keys["skip_first_steps"] = dense_steps
    return keys
