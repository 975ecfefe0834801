"""What the package knows about a family of diffusion transformers: data, and how to read a call's token layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ModelFamily", "TokenLayout", "patch_triple", "text_length"]


@dataclass(frozen=True)
class TokenLayout:
    """Where a forward's tokens stand in self-attention: `[prefix][video][suffix]`.

    Attributes:
        raw_latent_shape: `(B, C, T, H, W)` of the latents, whatever axes the model itself uses.
        patch_size: (t, h, w); the token grid is the latent grid divided by it.
        num_prefix_tokens, num_suffix_tokens: text or condition tokens before and after the video tokens.

    Raises:
        ValueError: a latent shape without five axes or smaller than a patch, or a negative count, as it comes from a sequence that is
            shorter than its grid.
    """

    raw_latent_shape: tuple[int, int, int, int, int]
    patch_size: tuple[int, int, int]
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0

    def __post_init__(self) -> None:
        if len(self.raw_latent_shape) != 5 or any(size < p for size, p in zip(self.raw_latent_shape[2:], self.patch_size, strict=True)):
            raise ValueError(f"latents {self.raw_latent_shape} do not make a grid of patches {self.patch_size}")
        if self.num_prefix_tokens < 0 or self.num_suffix_tokens < 0:
            raise ValueError(f"{self.num_prefix_tokens} tokens before and {self.num_suffix_tokens} after the video")


@dataclass(frozen=True)
class ModelFamily:
    """One family.

    Attributes:
        name: for reports and the compatibility matrix.
        transformer_classes: diffusers class names.
        layout: (model configuration, forward's named arguments) -> TokenLayout; may raise if the arguments are of an unknown form.
        self_attention: regular expression of the module paths that are self-attention (joint attention counts as self-attention).
        dispatches: its processors go through diffusers' attention dispatcher; False means they call torch's SDPA directly.
        supported: names of the backends that make sense for it; None means every one.
        notes: one sentence for the compatibility matrix.
    """

    name: str
    transformer_classes: tuple[str, ...]
    layout: Callable[[Any, Mapping[str, Any]], TokenLayout]
    self_attention: str
    dispatches: bool = True
    supported: frozenset[str] | None = None
    notes: str = ""

    def is_self_attention(self, path: str) -> bool:
        """True for the module paths that the family's backend serves."""
        return re.fullmatch(self.self_attention, path) is not None


def patch_triple(config: Any) -> tuple[int, int, int]:
    """(t, h, w) from a model configuration that holds a triple, or p and perhaps `patch_size_t`."""
    patch = config.patch_size
    if isinstance(patch, Sequence):
        frames, rows, columns = patch
        return int(frames), int(rows), int(columns)
    return int(getattr(config, "patch_size_t", None) or 1), int(patch), int(patch)


def text_length(arguments: Mapping[str, Any]) -> int:
    """Text tokens of a joint model: axis 1 of `encoder_hidden_states`."""
    return int(arguments["encoder_hidden_states"].shape[1])
