"""A request of `generate`, checked as far as possible before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer

from ditattn.backends.setting import Setting
from ditattn.cli.machine import check_backends, choose_device, choose_dtype
from ditattn.cli.outputs import check_file_name, check_folder
from ditattn.cli.settings import PIPELINE_KEYS, GenerateSettings, flag
from ditattn.errors import BackendUnavailable, ConfigError
from ditattn.packages import DIFFUSERS, IMAGEIO

__all__ = ["Job", "ModelFacts", "prepare"]


@dataclass(frozen=True)
class ModelFacts:
    """What is known about a model before it is loaded.

    Attributes:
        path: folder or hub id.
        pipeline: name of its pipeline class.
        pipeline_cls: the class; None where only remote code knows it.
        demo: the package's own demo model.
        random_weights: its weights mean nothing.
        defaults: settings that it is made for, where they are not those of its pipeline class.
    """

    path: str
    pipeline: str
    pipeline_cls: type | None
    demo: bool = False
    random_weights: bool = False
    defaults: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What is written about the model."""
        return {key: value for key, value in vars(self).items() if key not in ("pipeline_cls", "defaults")}


@dataclass(frozen=True)
class Job:
    """What the user, the model and the machine say together."""

    settings: GenerateSettings
    setting: Setting
    model: ModelFacts
    device: torch.device
    dtype: torch.dtype
    image: Any = None

    def value(self, key: str) -> Any:
        """A setting, or the model's own for it; None if the pipeline decides."""
        given = getattr(self.settings, key)
        return self.model.defaults.get(key) if given is None else given

    def call_arguments(self, prompt: str) -> dict[str, Any]:
        """Arguments of the pipeline's call that somebody set."""
        values = {key: self.value(key) for key in PIPELINE_KEYS} | {"prompt": prompt, "image": self.image}
        return {key: value for key, value in values.items() if value is not None}


def prepare(settings: GenerateSettings) -> Job:
    """Check everything that can be checked before weights are loaded.

    Raises:
        ConfigError, BackendUnavailable, ModelNotLoaded: something cannot be honoured.
    """
    if DIFFUSERS.missing():
        raise BackendUnavailable(DIFFUSERS.sentence())
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    setting = _attention(settings)
    check_backends(setting, device, dtype)
    check_folder(Path(settings.output_path), "--output-path")
    if settings.perf_dump_path:
        _check_dump_path(Path(settings.perf_dump_path))
    image = _read_image(settings.image_path)
    job = Job(settings, setting, _find_model(settings), device, dtype, image)
    _check_call(job)
    return job


def _attention(settings: GenerateSettings) -> Setting:
    try:
        return Setting.parse(settings.attention_backend, settings.attention_backend_config, settings.component_attention_backends)
    except ConfigError as error:
        if settings.attention_backend is not None:
            raise
        raise type(error)(f"{error} (no --attention-backend is named)") from None


def _find_model(settings: GenerateSettings) -> ModelFacts:
    from ditattn.hosts.diffusers.load import pipeline_class, read_index

    if settings.model_path is None:
        return _demo_model(settings)
    index = read_index(settings.model_path, settings.revision)
    return ModelFacts(settings.model_path, str(index.get("_class_name")), pipeline_class(index))


def _demo_model(settings: GenerateSettings) -> ModelFacts:
    from ditattn.hosts.diffusers.demo_model import DEFAULTS, find_demo_model
    from ditattn.hosts.diffusers.load import pipeline_class, read_index

    if settings.revision is not None:
        raise ConfigError("--revision needs a --model-path on the hub")
    demo = find_demo_model()
    note = "its weights are random, so it makes noise" if demo.random_weights else "small, trained for demonstrations"
    typer.echo(f"no --model-path: taking the demo model of the package ({note})", err=True)
    index = read_index(str(demo.path))
    return ModelFacts(str(demo.path), str(index["_class_name"]), pipeline_class(index), True, demo.random_weights, dict(DEFAULTS))


def _check_call(job: Job) -> None:
    """Does the pipeline take what was given, and does the file name fit what it makes?"""
    from ditattn.hosts.diffusers.call import call_defaults, check_arguments, makes_video

    pipeline_cls, settings = job.model.pipeline_cls, job.settings
    if pipeline_cls is None:
        return
    check_arguments(pipeline_cls, job.call_arguments(settings.prompt[0]), _called)
    is_video = makes_video(pipeline_cls)
    if settings.fps is not None and not is_video:
        raise ConfigError(f"--fps cannot be honoured: {pipeline_cls.__name__} makes an image")
    num_frames = (job.value("num_frames") or call_defaults(pipeline_cls).get("num_frames")) if is_video else 1
    suffix = ".png" if num_frames == 1 else ".mp4"
    if settings.output_file_name is not None:
        stem = check_file_name(settings.output_file_name, suffix)
        if settings.perf_dump_path:
            _check_dump_is_another_file(Path(settings.perf_dump_path), Path(settings.output_path) / (stem + suffix))
    if suffix == ".mp4" and IMAGEIO.missing():
        raise BackendUnavailable(IMAGEIO.sentence())


def _check_dump_path(path: Path) -> None:
    check_folder(path.parent, "--perf-dump-path")
    if path.is_dir():
        raise ConfigError(f"--perf-dump-path: {path} is a folder; name a .json file")


def _check_dump_is_another_file(dump: Path, result: Path) -> None:
    """With several prompts all three names get the same numbers."""
    for other, what in ((result, "the result"), (result.with_suffix(".json"), "the record of the run")):
        if dump.resolve() == other.resolve():
            raise ConfigError(f"--perf-dump-path: {dump} is where {what} will be written; name another file")


def _called(argument: str) -> str:
    return "--image-path" if argument == "image" else flag(argument)


def _read_image(path: str | None) -> Any:
    if path is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise ConfigError(f"--image-path: no such file: {path}") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ConfigError(f"--image-path: {path} is not an image that can be read ({type(error).__name__})") from None
