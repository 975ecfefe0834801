"""The settings of `generate`: from a file, from the command line, checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat

from ditattn.errors import ConfigError
from ditattn.values import KnownKeys, parse_config, parse_value

__all__ = [
    "PIPELINE_KEYS",
    "CallSettings",
    "CompareSettings",
    "GenerateSettings",
    "TuneSettings",
    "flag",
    "read_call_settings",
    "read_settings",
]

SettingsT = TypeVar("SettingsT", bound="CallSettings")

# settings that are arguments of the pipeline's call, under the same name
PIPELINE_KEYS = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, (str, int, dict)) else value


def _parsed(value: Any) -> Any:
    return parse_config(value) if isinstance(value, str) else value


def _axes(value: Any) -> Any:
    """`["sparsity=0.5,0.75", ...]` as {"sparsity": [0.5, 0.75], ...}."""
    if not isinstance(value, (list, str)):
        return value
    axes: dict[str, list[Any]] = {}
    for text in [value] if isinstance(value, str) else value:
        key, equals, values = str(text).partition("=")
        found = [parse_value(key.strip(), piece) for piece in values.split(",")]
        if not equals or not key.strip() or None in found:
            raise ValueError(f"{text!r} is not of the form key=value,value")
        if key.strip() in axes:
            raise ValueError(f"{key.strip()} is named twice")
        axes[key.strip()] = found
    return axes


Prompts = Annotated[list[str], BeforeValidator(_one_or_more)]
Pairs = Annotated[dict[str, Any], BeforeValidator(_parsed)]
Names = Annotated[dict[str, str], BeforeValidator(_parsed)]
# no shell expands ~ in a file, nor bash in --output-path=~/videos, which would make a folder of that name
UserPath = Annotated[str, AfterValidator(os.path.expanduser)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[list[Seed], BeforeValidator(_one_or_more), Field(min_length=1)]
ManyPairs = Annotated[list[Pairs], BeforeValidator(_one_or_more)]
Grid = Annotated[dict[str, list[Any]], BeforeValidator(_axes)]


class CallSettings(KnownKeys):
    """Keys of every verb that runs a pipeline. None leaves the choice to the model."""

    model_path: str | None = None
    prompt: Prompts = Field(default_factory=list)
    negative_prompt: str | None = None
    height: Count | None = None
    width: Count | None = None
    num_frames: Count | None = None
    fps: Count | None = None
    num_inference_steps: Count | None = None
    guidance_scale: FiniteFloat | None = None
    output_path: UserPath = "outputs"
    output_file_name: str | None = None
    component_attention_backends: Names = Field(default_factory=dict)
    device: str | None = None
    dtype: str | None = None
    image_path: UserPath | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    strict: bool = False


class GenerateSettings(CallSettings):
    """Every key that a configuration file of `generate` may hold."""

    seed: Seed = 42
    attention_backend: str | None = None
    attention_backend_config: Pairs = Field(default_factory=dict)
    perf_dump_path: UserPath | None = None


class CompareSettings(CallSettings):
    """Every key that a configuration file of `compare` may hold."""

    seed: Seeds = Field(default_factory=lambda: [42])
    attention_backend: Prompts = Field(default_factory=list)
    attention_backend_config: ManyPairs = Field(default_factory=list)
    grid: Grid = Field(default_factory=dict)
    repeats: Count = 1
    probe: bool = True
    reference_cache: bool = True


class TuneSettings(CallSettings):
    """Every key that a configuration file of `tune` may hold."""

    target_psnr: FiniteFloat | None = Field(None, ge=1)
    target_ssim: float | None = Field(None, ge=0, le=1)
    budget_runs: Count = 12
    check_prompt: Prompts = Field(default_factory=list)
    seed: Seeds = Field(default_factory=lambda: [42])
    attention_backend: str = "rain_fusion_attn"
    attention_backend_config: Pairs = Field(default_factory=dict)


def flag(key: str) -> str:
    """The option of a key, as users type it."""
    return "--" + key.replace("_", "-")


def read_settings(options: Mapping[str, Any], config: str | None = None) -> GenerateSettings:
    """`read_call_settings` of `generate`."""
    return read_call_settings(GenerateSettings, options, config)


def read_call_settings(cls: type[SettingsT], options: Mapping[str, Any], config: str | None = None) -> SettingsT:
    """Settings from a configuration file and from the command line, which wins.

    Args:
        cls: the settings of the verb.
        options: what the command line gave.
        config: path of a JSON or YAML file with the same names in snake_case.

    Raises:
        UnknownKey: a key of the file that does not exist, with the nearest one that does.
        ConfigError: a wrong value, a missing prompt, an unreadable file.
    """
    values = {**(parse_config("@" + config) if config else {}), **options}
    settings = cls.from_mapping(values)
    if not settings.prompt or not all(prompt.strip() for prompt in settings.prompt):
        raise ConfigError("a prompt is needed: --prompt TEXT, or the key 'prompt' in the --config file")
    return settings
