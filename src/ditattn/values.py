"""Settings as users write them: a fixed set of keys, read from a file, JSON text or `k=v,k=v`, and validated.

Unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from ditattn.errors import ConfigError, UnknownKey

__all__ = ["KnownKeys", "parse_config", "parse_value", "sentences", "unknown_key"]


class KnownKeys(BaseModel):
    """Settings with a fixed set of keys. Immutable; `from_mapping` raises ConfigError instead of pydantic's own error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_flags_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        # to pydantic true is 1
        kinds = set(_kinds(cls.model_fields[str(info.field_name)].annotation))
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError("Input should be a number, which true and false are not")
        return value

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Validate `values`.

        Raises:
            UnknownKey: a key that does not exist, with the nearest one that does.
            ConfigError: a value of the wrong type or outside its range.
        """
        for key in values:
            if key not in cls.model_fields:
                raise UnknownKey(unknown_key(key, list(cls.model_fields)))
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(sentences(error, cls))) from None


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that a key may have."""
    if get_origin(annotation) in (Union, UnionType):
        for alternative in get_args(annotation):
            yield from _kinds(alternative)
    elif get_origin(annotation) is Annotated:
        yield from _kinds(get_args(annotation)[0])
    else:
        yield annotation


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
            return _mapping(json.loads(text, object_pairs_hook=_each_once), "JSON text")
        except json.JSONDecodeError as error:
            raise ConfigError(f"not valid JSON: {error.msg} at character {error.pos + 1} of {text!r}") from None
    return _read_pairs(text)


def _read_file(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a configuration file")
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    try:
        content = _read_yaml(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML or JSON: {' '.join(str(error).split())}") from None
    return _mapping(content or {}, str(path))


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
    return {key: parse_value(key, value) for key, value in _each_once(pairs).items()}


def _each_once(pairs: Iterable[Sequence[Any]]) -> dict[Any, Any]:
    """Pairs of key and value as a mapping. JSON and YAML would take the last value of a key without a word."""
    found: dict[Any, Any] = {}
    repeated = []
    for key, value in pairs:
        if key in found:
            repeated.append(key)
        found[key] = value
    if repeated:
        raise ConfigError(f"given twice: {', '.join(sorted(map(str, set(repeated))))}")
    return found


class _YamlOfKeysGivenOnce(yaml.SafeLoader):
    """As yaml.safe_load."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _each_once((key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    # derived from the safe loader
    return yaml.load(text, _YamlOfKeysGivenOnce)


def parse_value(key: str, text: str) -> Any:
    """One value as users type it: YAML, so that numbers, true and false are what they look like.

    Raises:
        ConfigError: the text means something else in YAML and is broken; names the key.
    """
    try:
        return _read_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"{key}: {text!r} cannot be read; words with special characters need quotes inside the quotes of the shell"
        ) from None


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{source} must hold keys and values, not {type(value).__name__}")
    return value


def unknown_key(key: str, known: list[str]) -> str:
    """What an UnknownKey says: the key, the nearest one that is known, and all of them."""
    if not known:
        return f"unknown key '{key}': this backend has no configuration keys"
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
    return f"unknown key '{key}'; did you mean '{nearest}'? Known keys: {', '.join(known)}"


def sentences(error: ValidationError, cls: type[BaseModel]) -> Iterator[str]:
    """One for each value that is wrong: what it should be, by all types that the key of `cls` may have."""
    wanted: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        wanted.setdefault((_path(item["loc"], cls), repr(item["input"])), []).append(item["msg"].removeprefix("Value error, "))
    for (key, value), messages in wanted.items():
        others = dict.fromkeys(message.removeprefix("Input should be ") for message in messages[1:])
        yield f"{key}: {'; or '.join([messages[0], *others])} (got {value})"


def _path(loc: tuple[int | str, ...], cls: type[BaseModel]) -> str:
    """Key, names and places of a value. Behind a key of several types stands the one that was tried, which is no part of it."""
    field = cls.model_fields.get(str(loc[0])) if loc else None
    several = field is not None and get_origin(field.annotation) in (Union, UnionType)
    return ".".join(str(part) for place, part in enumerate(loc) if not (several and place == 1 and isinstance(part, str)))
