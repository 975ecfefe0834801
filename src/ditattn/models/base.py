"""What the package knows about a family of diffusion transformers: data, and how to read its configuration and a call's token layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ditattn.errors import ConfigError
from ditattn.plan.token_grids import TokenGrid, grids_of_sequence

__all__ = ["DEFAULT_FRAME_RATE", "ModelFamily", "TokenLayout", "one_more_than_a_multiple", "patch_triple", "text_length"]

DEFAULT_FRAME_RATE = 24
"""Frames per second where nothing else is known."""


@dataclass(frozen=True)
class TokenLayout:
    """Where a forward's tokens stand in self-attention: `[prefix][video][suffix]`, and further grids in prefix and suffix.

    Attributes:
        raw_latent_shape: `(B, C, T, H, W)` of the latents, whatever axes the model itself uses.
        patch_size: (t, h, w); the token grid is the latent grid divided by it.
        num_prefix_tokens, num_suffix_tokens: all tokens before and after the video tokens.
        further_grids: references, conditions or layers among those tokens. What is in no grid (text, audio) is kept whole.

    Raises:
        ValueError: a latent shape without five axes or smaller than a patch, a negative count, as it comes from a sequence that is
            shorter than its grid, or grids that overlap or reach beyond the sequence.
    """

    raw_latent_shape: tuple[int, int, int, int, int]
    patch_size: tuple[int, int, int]
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0
    further_grids: tuple[TokenGrid, ...] = ()

    def __post_init__(self) -> None:
        if len(self.raw_latent_shape) != 5 or any(size < p for size, p in zip(self.raw_latent_shape[2:], self.patch_size, strict=True)):
            raise ValueError(f"latents {self.raw_latent_shape} do not make a grid of patches {self.patch_size}")
        if self.num_prefix_tokens < 0 or self.num_suffix_tokens < 0:
            raise ValueError(f"{self.num_prefix_tokens} tokens before and {self.num_suffix_tokens} after the video")
        if self.further_grids:
            grids_of_sequence(self.grid, self.num_prefix_tokens, self.num_suffix_tokens, self.further_grids)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(F, Y, X) tokens of the video."""
        frames, rows, columns = (size // p for size, p in zip(self.raw_latent_shape[2:], self.patch_size, strict=True))
        return frames, rows, columns

    @classmethod
    def of_grids(cls, batch: int, channels: int, grids: Sequence[TokenGrid], length: int, target: int = 0) -> TokenLayout:
        """The layout of a sequence of packed tokens.

        Args:
            batch, channels: of the packed latents.
            grids: all of them.
            length: tokens of the sequence.
            target: number of the grid that is generated.
        """
        own = grids[target]
        further = tuple(grid for number, grid in enumerate(grids) if number != target)
        return cls((batch, channels, *own.size), (1, 1, 1), own.start, length - own.stop, further)


def default_frame_rate(pipeline_config: Any) -> int:
    """What most families were trained on."""
    return DEFAULT_FRAME_RATE


def one_more_than_a_multiple(num_frames: int, factor: int) -> int:
    """The rule of causal VAEs: the first frame stands alone, `factor` frames share each further latent.

    Raises:
        ConfigError: not of this form; says which counts are near.
    """
    if num_frames % factor != 1 % factor:
        below = (num_frames - 1) // factor * factor + 1
        raise ConfigError(f"num_frames must be a multiple of {factor} plus 1, not {num_frames}; nearest: {below} or {below + factor}")
    return num_frames


def attention_head_dim(config: Any) -> int:
    """Under the name that most of diffusers' transformers give it."""
    return int(config.attention_head_dim)


@dataclass(frozen=True)
class ModelFamily:
    """One family: everything that is true of it and not of every model. No other folder names a family.

    Attributes:
        name: for reports and the compatibility matrix.
        transformer_classes: diffusers class names.
        layout: (model configuration, forward's named arguments) -> TokenLayout; may raise if the arguments are of an unknown form.
        self_attention: regular expression of the module paths that are self-attention (joint attention counts as self-attention).
        head_size: model configuration -> D of its self-attention.
        frame_rate: pipeline configuration -> frames per second that its videos are meant to be played at.
        size_multiple: heights and widths must be a multiple of it, whatever VAE and patch ask for.
        frames_to_ask: (frames wanted, frames per latent) -> the `num_frames` that makes the pipeline make exactly that many; raises
            ConfigError where nothing does.
        full_precision_vaes: class names of VAEs that lose quality in half precision and whose pipelines cast the latents to the VAE's own
            dtype.
        untrue_notices: what its pipelines log although it is not so, by name of the logger: records that hold the text are dropped.
        dispatches: its processors go through diffusers' attention dispatcher; False means they call torch's SDPA directly.
        supported: names of the backends that make sense for it; None means every one.
        notes: one sentence for the compatibility matrix.
    """

    name: str
    transformer_classes: tuple[str, ...]
    layout: Callable[[Any, Mapping[str, Any]], TokenLayout]
    self_attention: str
    head_size: Callable[[Any], int] = attention_head_dim
    frame_rate: Callable[[Any], int] = default_frame_rate
    size_multiple: int = 1
    frames_to_ask: Callable[[int, int], int] = one_more_than_a_multiple
    full_precision_vaes: frozenset[str] = frozenset()
    untrue_notices: Mapping[str, str] = field(default_factory=dict)
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
