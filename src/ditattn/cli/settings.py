"""The settings of `generate`: from a file, from the command line, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ditattn.config import KnownKeys, parse_config
from ditattn.errors import ConfigError

__all__ = ["PIPELINE_KEYS", "GenerateSettings", "flag", "read_settings"]

# settings that are arguments of the pipeline's call, under the same name
PIPELINE_KEYS = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _parsed(value: Any) -> Any:
    return parse_config(value) if isinstance(value, str) else value


Prompts = Annotated[list[str], BeforeValidator(_one_or_more)]
Pairs = Annotated[dict[str, Any], BeforeValidator(_parsed)]
Names = Annotated[dict[str, str], BeforeValidator(_parsed)]
Count = Annotated[int, Field(ge=1)]


class GenerateSettings(KnownKeys):
    """Every key that a configuration file may hold. None leaves the choice to the model."""

    model_path: str | None = None
    prompt: Prompts = Field(default_factory=list)
    negative_prompt: str | None = None
    height: Count | None = None
    width: Count | None = None
    num_frames: Count | None = None
    fps: Count | None = None
    num_inference_steps: Count | None = None
    guidance_scale: float | None = None
    seed: int = Field(42, ge=0, lt=2**63)
    output_path: str = "outputs"
    output_file_name: str | None = None
    attention_backend: str | None = None
    attention_backend_config: Pairs = Field(default_factory=dict)
    component_attention_backends: Names = Field(default_factory=dict)
    perf_dump_path: str | None = None
    device: str | None = None
    dtype: str | None = None
    image_path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    strict: bool = False


def flag(key: str) -> str:
    """The option of a key, as users type it."""
    return "--" + key.replace("_", "-")


def read_settings(options: Mapping[str, Any], config: str | None = None) -> GenerateSettings:
    """Settings from a configuration file and from the command line, which wins.

    Args:
        options: what the command line gave.
        config: path of a JSON or YAML file with the same names in snake_case.

    Raises:
        UnknownKey: a key of the file that does not exist, with the nearest one that does.
        ConfigError: a wrong value, a missing prompt, an unreadable file.
    """
    values = {**(parse_config("@" + config) if config else {}), **options}
    settings = GenerateSettings.from_mapping(values)
    if not settings.prompt or not all(prompt.strip() for prompt in settings.prompt):
        raise ConfigError("a prompt is needed: --prompt TEXT, or the key 'prompt' in the --config file")
    return settings
