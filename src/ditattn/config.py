"""Backend configuration: read it from a file, JSON text or `k=v,k=v`, and validate it.

One pydantic model per kind of backend; unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ditattn.errors import ConfigError, UnknownKey

__all__ = [
    "AttentionConfig",
    "BlockSparseAttentionConfig",
    "DenseAttentionConfig",
    "KnownKeys",
    "RainFusionAttentionConfig",
    "SparseAttentionConfig",
    "check_skip_and_sparsity",
    "parse_config",
    "parse_layers",
    "parse_value",
    "resolve_steps",
]

ConfigT = TypeVar("ConfigT", bound="KnownKeys")
Steps = int | str
TokenOrderName = Literal["tile", "raster"]


class KnownKeys(BaseModel):
    """Settings with a fixed set of keys. Immutable; `from_mapping` raises ConfigError instead of pydantic's own error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @classmethod
    def from_mapping(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """Validate `values`.

        Raises:
            UnknownKey: a key that does not exist, with the nearest one that does.
            ConfigError: a value of the wrong type or outside its range.
        """
        for key in values:
            if key not in cls.model_fields:
                raise UnknownKey(_unknown_key(key, list(cls.model_fields)))
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(_sentence(item) for item in error.errors())) from None


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


def check_skip_and_sparsity(skip_first_steps: int, sparsity: float) -> None:
    """Raise ConfigError, naming both values, unless skip_first_steps >= 0 and 0 <= sparsity < 1."""
    if skip_first_steps < 0 or not 0 <= sparsity < 1:
        raise ConfigError(
            f"invalid attention metadata: skip_first_steps={skip_first_steps} (must be >= 0), sparsity={sparsity} (must be >= 0 and < 1)"
        )


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


def parse_config(text: str) -> dict[str, Any]:
    """Read a configuration as users type it, without validating its keys.

    Args:
        text: the path of a `.json`, `.yaml` or `.yml` file (an `@` before it is allowed), JSON text, or `k=v,k=v`.

    Raises:
        ConfigError: says which of the three forms was tried and what is wrong with it.
    """
    text = text.strip()
    if not text:
        return {}
    if text.startswith("@") or Path(text).suffix.lower() in (".json", ".yaml", ".yml"):
        return _read_file(Path(text.removeprefix("@")))
    if text.startswith("{"):
        try:
            return _mapping(json.loads(text), "JSON text")
        except json.JSONDecodeError as error:
            raise ConfigError(f"not valid JSON: {error.msg} at character {error.pos + 1} of {text!r}") from None
    return _read_pairs(text)


def _read_file(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a configuration file")
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    try:
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")) or {}, str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML or JSON: {' '.join(str(error).split())}") from None


def _read_pairs(text: str) -> dict[str, Any]:
    pairs: list[list[str]] = []
    for piece in text.split(","):
        key, equals, value = piece.partition("=")
        if equals:
            pairs.append([key.strip(), value.strip()])
        elif pairs:
            # a comma inside a value, as in skip_layers=0-1,38
            pairs[-1][1] += "," + piece.strip()
        else:
            raise ConfigError(f"'{text}' is neither an existing .json/.yaml file, nor JSON text, nor k=v,k=v")
    repeated = {key for key, _ in pairs if [other for other, _ in pairs].count(key) > 1}
    if repeated:
        raise ConfigError(f"given twice: {', '.join(sorted(repeated))}")
    return {key: parse_value(key, value) for key, value in pairs}


def parse_value(key: str, text: str) -> Any:
    """One value as users type it: YAML, so that numbers, true and false are what they look like.

    Raises:
        ConfigError: the text means something else in YAML and is broken; names the key.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"{key}: {text!r} cannot be read; words with special characters need quotes inside the quotes of the shell"
        ) from None


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{source} must hold keys and values, not {type(value).__name__}")
    return value


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


def _unknown_key(key: str, known: list[str]) -> str:
    if not known:
        return f"unknown key '{key}': this backend has no configuration keys"
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
    return f"unknown key '{key}'; did you mean '{nearest}'? Known keys: {', '.join(known)}"


def _sentence(item: Any) -> str:
    key = ".".join(map(str, item["loc"]))
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {item['input']!r})"
