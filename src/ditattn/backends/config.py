"""Configuration of the backends: one pydantic model per kind of backend."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from ditattn.errors import ConfigError, UnknownKey
from ditattn.values import KnownKeys

__all__ = [
    "STEP_CACHE_KEY",
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
PresetName = Literal["quality", "balanced", "fast", "ascend"]

# of the sparse backends, unless a backend has its own; what each does to the picture is measured in docs/backends/permuted_sparse_attn.md
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quality": {"sparsity": 0.5, "skip_first_steps": "auto"},
    "balanced": {"sparsity": 0.75, "skip_first_steps": "auto"},
    "fast": {"sparsity": 0.9, "skip_first_steps": "auto"},
    "ascend": {"sparsity": 0.2, "skip_first_steps": 10},
}

# "auto": runs of up to so many steps have one dense step, longer ones this share
FEW_STEPS = 8
AUTO_SHARE = 0.2
# so that a slip of the keyboard is an error, and not a list that fills the memory
LAST_LAYER = 9999


STEP_CACHE_KEY = "step_cache"
"""In a file that `tune` wrote: the step cache that the other keys were found beside. Of the host, and no key of the attention."""


class AttentionConfig(KnownKeys):
    """Base of every backend configuration."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Validate `values`. Raises as `KnownKeys.from_mapping`; who reads a step cache too has taken its key out before."""
        if STEP_CACHE_KEY in values:
            raise UnknownKey(
                f"{STEP_CACHE_KEY}: these keys were tuned beside a step cache ({values[STEP_CACHE_KEY]}), which cannot be switched on "
                "from here: take this key out to run without it"
            )
        return super().from_mapping(values)


class DenseAttentionConfig(AttentionConfig):
    """Dense backends have nothing to set."""


# An H200 has computed dense attention over fewer tokens before the host has queued the many small steps of a sparse call
LEAST_TOKENS = {"cuda": 16384}
LEAST_TOKENS_ELSEWHERE = 4096


class SparseAttentionConfig(AttentionConfig):
    """What every sparse backend understands.

    Attributes:
        preset: what `sparsity` and `skip_first_steps` are where they are not given: "quality", "balanced", "fast", or "ascend" for the
            defaults of the Ascend originals, which run ten steps densely.
        sparsity: asked share of key blocks to drop, 0 <= sparsity < 1; 0 runs densely.
        skip_first_steps: the first steps run densely: a number, a share of all steps such as "20%" (rounded up), or "auto": 20 % of the
            steps, and one step in runs of up to 8.
        skip_last_steps: the last steps run densely: a number or a share.
        skip_layers: layers that always run densely, such as "0-1,38".
        min_tokens: sequences shorter than this run densely: a number, or "auto" for `LEAST_TOKENS` of the device.
        token_order: "tile" (8x8 tiles of a frame stay together) or "raster" (the model's own order).
        first_frame_sink: keep the blocks of a video's first frame, as query rows and as key columns.
        plan_refresh_steps: a layer picks its blocks anew every so many steps; 1 is every step.
        share_plan_between_branches: with classifier-free guidance, the blocks that the first branch of a step picked serve the others.
        assume_layout: of a model of no known family whose tokens could not be seen to stand in raster order, take the sequence for the grid
            of its latents where their lengths agree.

    Examples:
        >>> import ditattn
        >>> config = ditattn.SparseAttentionConfig(preset="fast", skip_layers="0-1")
        >>> config.sparsity, config.skip_first_steps
        (0.9, 'auto')
    """

    preset: PresetName = "balanced"
    sparsity: float = Field(0.75, ge=0, lt=1)
    skip_first_steps: Steps = "auto"
    skip_last_steps: Steps = 0
    skip_layers: str = ""
    min_tokens: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    token_order: TokenOrderName = "raster"
    first_frame_sink: bool = True
    plan_refresh_steps: int = Field(1, ge=1)
    share_plan_between_branches: bool = False
    assume_layout: bool = False

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def least_tokens(self, device_type: str) -> int:
        """`min_tokens` as a number."""
        return LEAST_TOKENS.get(device_type, LEAST_TOKENS_ELSEWHERE) if self.min_tokens == "auto" else self.min_tokens

    def named_layers(self) -> Mapping[str, Collection[int]]:
        """By key, the layers that it speaks of: a model without one of them cannot honour the key."""
        return {"skip_layers": parse_layers(self.skip_layers)}

    @property
    def outlasts_steps(self) -> bool:
        """True if layers keep something from one step for another, so that they must know which forwards belong together."""
        return self.plan_refresh_steps > 1 or self.share_plan_between_branches

    @field_validator("skip_first_steps", mode="before")
    @classmethod
    def _check_first_steps(cls, value: Any) -> Steps:
        return "auto" if isinstance(value, str) and value.strip() == "auto" else _share_or_count(value, " nor 'auto'")

    @field_validator("skip_last_steps", mode="before")
    @classmethod
    def _check_last_steps(cls, value: Any) -> Steps:
        return _share_or_count(value)

    @model_validator(mode="after")
    def _fill_from_preset(self) -> SparseAttentionConfig:
        # past pydantic, which would count these keys as given: whoever reads what was given finds the preset alone
        vars(self).update({key: value for key, value in self.presets[self.preset].items() if key not in self.model_fields_set})
        return self

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
    """A number of steps from a count, a share ("20%", rounded up) or "auto". None if one of these meets an unknown number of steps."""
    if isinstance(value, int):
        return value
    if num_steps is None:
        return None
    if value == "auto":
        return 1 if num_steps <= FEW_STEPS else math.ceil(round(AUTO_SHARE * num_steps, 6))
    return math.ceil(round(float(value.removesuffix("%")) / 100 * num_steps, 6))


def parse_layers(text: str) -> frozenset[int]:
    """Layer numbers from a selector such as "0-1,38".

    Raises:
        ConfigError: a part that is neither a number nor a rising range, or a number that no model has.
    """
    layers: set[int] = set()
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()) or part.endswith("-") or (last and int(last) < int(first)):
            raise ConfigError(f"skip_layers: '{part}' is neither a layer number nor a range such as 0-3")
        if int(last or first) > LAST_LAYER:
            raise ConfigError(f"skip_layers: '{part}': no model has more than {LAST_LAYER + 1} layers")
        layers.update(range(int(first), int(last or first) + 1))
    return frozenset(layers)


def _share_or_count(value: Any, more: str = "") -> Steps:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r} is neither a number of steps nor a share such as '20%'{more}")
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
        raise ValueError(f"{value!r} is neither a number of steps nor a share between 0% and 100%{more}")
    return f"{number}%"
