"""Configuration of the backends: one pydantic model per kind of backend."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator

from ditattn.errors import ConfigError
from ditattn.values import KnownKeys

__all__ = [
    "AttentionConfig",
    "BlockSparseAttentionConfig",
    "DenseAttentionConfig",
    "RainFusionAttentionConfig",
    "SparseAttentionConfig",
    "parse_layers",
    "resolve_steps",
]

Steps = int | str
TokenOrderName = Literal["tile", "raster"]


class AttentionConfig(KnownKeys):
    """Base of every backend configuration."""


class DenseAttentionConfig(AttentionConfig):
    """Dense backends have nothing to set."""


class SparseAttentionConfig(AttentionConfig):
    """What both sparse backends understand. The first two keys have the defaults of the Ascend originals.

    Attributes:
        sparsity: asked share of key blocks to drop, 0 <= sparsity < 1; 0 runs densely.
        skip_first_steps: the first steps run densely: a number, or a share of all steps such as "20%" (rounded up).
        skip_last_steps: the last steps run densely, in the same form.
        skip_layers: layers that always run densely, such as "0-1,38".
        min_tokens: sequences shorter than this run densely.
        token_order: "tile" (8x8 tiles of a frame stay together) or "raster" (the model's own order).
        first_frame_sink: keep the blocks of a video's first frame, as query rows and as key columns.
        plan_refresh_steps: a layer picks its blocks anew every so many steps; 1 is every step.
        share_plan_between_branches: with classifier-free guidance, the blocks that the first branch of a step picked serve the others.
    """

    sparsity: float = Field(0.2, ge=0, lt=1)
    skip_first_steps: Steps = 10
    skip_last_steps: Steps = 0
    skip_layers: str = ""
    min_tokens: int = Field(4096, ge=0)
    token_order: TokenOrderName = "raster"
    first_frame_sink: bool = True
    plan_refresh_steps: int = Field(1, ge=1)
    share_plan_between_branches: bool = False

    @field_validator("skip_first_steps", "skip_last_steps", mode="before")
    @classmethod
    def _check_steps(cls, value: Any) -> Steps:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f"{value!r} is neither a number of steps nor a share such as '20%'")
        return _share_or_count(value)

    @field_validator("skip_layers", mode="before")
    @classmethod
    def _check_layers(cls, value: Any) -> str:
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        parse_layers(text)
        return text


class BlockSparseAttentionConfig(SparseAttentionConfig):
    """Keys of `block_sparse_attn`.

    Attributes:
        threshold: nucleus: keep the best blocks until this share of the estimated softmax mass is reached; 1 switches it off.
            `sparsity` remains the cap.
        keep_sink: always keep the first key block.
        keep_recent: always keep the last key block.
    """

    threshold: float = Field(1.0, gt=0, le=1)
    keep_sink: bool = True
    keep_recent: bool = True


class RainFusionAttentionConfig(SparseAttentionConfig):
    """Keys of `rain_fusion_attn`."""

    token_order: TokenOrderName = "tile"


def resolve_steps(value: Steps, num_steps: int | None) -> int | None:
    """A number of steps from a count or a share ("20%", rounded up). None if a share meets an unknown number of steps."""
    if isinstance(value, int):
        return value
    if num_steps is None:
        return None
    return math.ceil(round(float(value.removesuffix("%")) / 100 * num_steps, 6))


def parse_layers(text: str) -> frozenset[int]:
    """Layer numbers from a selector such as "0-1,38".

    Raises:
        ConfigError: a part that is neither a number nor a rising range.
    """
    layers: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or part.endswith("-") or (last and int(last) < int(first)):
            raise ConfigError(f"skip_layers: '{part}' is neither a layer number nor a range such as 0-3")
        layers.update(range(int(first), int(last or first) + 1))
    return frozenset(layers)


def _share_or_count(value: Steps) -> Steps:
    if isinstance(value, int) or value.strip().isdigit():
        count = int(value)
        if count < 0:
            raise ValueError(f"{count} is negative")
        return count
    number = value.strip().removesuffix("%")
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if not value.strip().endswith("%") or not 0 <= share <= 100:
        raise ValueError(f"{value!r} is neither a number of steps nor a share between 0% and 100%")
    return f"{number}%"
