"""A request, checked as far as possible before weights are loaded, and then loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer

from ditattn.backends.selector import backend_on
from ditattn.backends.setting import Setting
from ditattn.cli.device import choose_device, choose_dtype
from ditattn.cli.output import check_folder
from ditattn.cli.ranks import own_device
from ditattn.cli.settings import PIPELINE_KEYS, CallSettings, flag
from ditattn.cli.terminal import timed
from ditattn.devices import find_device
from ditattn.errors import BackendUnavailable, ConfigError
from ditattn.packages import DIFFUSERS, IMAGEIO

__all__ = ["ANY_HEAD_SIZE", "Job", "ModelFacts", "load", "pipeline_arguments", "playing_rate", "prepare"]

# possible for every backend that has limits; the model's own head size is checked when the backend is installed
ANY_HEAD_SIZE = 64


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

    settings: CallSettings
    model: ModelFacts
    device: torch.device
    dtype: torch.dtype
    image: Any = None

    def value(self, key: str) -> Any:
        """A setting, or the model's own for it; None if the pipeline decides."""
        given = getattr(self.settings, key)
        return self.model.defaults.get(key) if given is None else given

    @property
    def suffix(self) -> str | None:
        """Of the files that the pipeline's results become; None where only remote code knows the pipeline."""
        from ditattn.hosts.diffusers.call import call_defaults, makes_video

        pipeline_cls = self.model.pipeline_cls
        if pipeline_cls is None:
            return None
        num_frames = (self.value("num_frames") or call_defaults(pipeline_cls).get("num_frames")) if makes_video(pipeline_cls) else 1
        return ".png" if num_frames == 1 else ".mp4"

    def call_arguments(self, prompt: str) -> dict[str, Any]:
        """Arguments of the pipeline's call that somebody set."""
        values = {key: self.value(key) for key in PIPELINE_KEYS} | {"prompt": prompt, "image": self.image}
        return {key: value for key, value in values.items() if value is not None}


def prepare(settings: CallSettings, attention: Sequence[Setting]) -> Job:
    """Check everything that can be checked before weights are loaded.

    Args:
        settings: of the verb.
        attention: what will be installed.

    Raises:
        ConfigError, BackendUnavailable, ModelNotLoaded: something cannot be honoured.
    """
    if DIFFUSERS.missing():
        raise BackendUnavailable(DIFFUSERS.sentence())
    device = choose_device(own_device(settings.device))
    dtype = choose_dtype(settings.dtype, device)
    for name in {name: None for setting in attention for name in (setting.config_owner, *setting.components.values())}:
        backend_on(find_device(device), name, ANY_HEAD_SIZE, dtype)
    if settings.uneven_split and min(settings.ulysses_degree, settings.ring_degree) > 1:
        raise ConfigError("--uneven-split needs --ulysses-degree 1 or --ring-degree 1: diffusers splits unevenly by one of them alone")
    check_folder(Path(settings.output_path), "--output-path")
    image = _read_image(settings.image_path)
    job = Job(settings, _find_model(settings), device, dtype, image)
    _check_call(job)
    return job


def _find_model(settings: CallSettings) -> ModelFacts:
    from ditattn.hosts.diffusers.load import pipeline_class, read_index

    if settings.model_path is None:
        return _demo_model(settings)
    if settings.revision is not None and Path(settings.model_path).expanduser().exists():
        raise ConfigError(f"--revision is for a --model-path on the hub; {settings.model_path} is a folder, which has no revisions")
    index = read_index(settings.model_path, settings.revision)
    return ModelFacts(settings.model_path, str(index.get("_class_name")), pipeline_class(index))


def _demo_model(settings: CallSettings) -> ModelFacts:
    from ditattn.hosts.diffusers.demo_model import CAPTION, DEFAULTS, find_demo_model, unknown_words
    from ditattn.hosts.diffusers.load import pipeline_class, read_index

    if settings.revision is not None:
        raise ConfigError("--revision needs a --model-path on the hub")
    demo = find_demo_model()
    note = "its weights are random, so it makes noise" if demo.random_weights else "small, trained for demonstrations"
    typer.echo(f"no --model-path: taking the demo model of the package ({note})", err=True)
    unknown = [word for prompt in settings.prompt for word in unknown_words(demo, prompt)]
    if unknown:
        listed = ", ".join(f"'{word}'" for word in dict.fromkeys(unknown))
        typer.echo(f"the demo model does not know {listed}; its captions read like '{CAPTION}'", err=True)
    index = read_index(str(demo.path))
    return ModelFacts(str(demo.path), str(index["_class_name"]), pipeline_class(index), True, demo.random_weights, dict(DEFAULTS))


def _check_call(job: Job) -> None:
    """Does the pipeline take what was given, and can its result be written?"""
    from ditattn.hosts.diffusers.call import check_arguments, makes_video

    pipeline_cls, settings = job.model.pipeline_cls, job.settings
    if pipeline_cls is None:
        return
    check_arguments(pipeline_cls, job.call_arguments(settings.prompt[0]), _called)
    if settings.fps is not None and not makes_video(pipeline_cls):
        raise ConfigError(f"--fps cannot be honoured: {pipeline_cls.__name__} makes an image")
    if job.suffix == ".mp4" and IMAGEIO.missing():
        raise BackendUnavailable(IMAGEIO.sentence())


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


def load(job: Job) -> tuple[Any, float]:
    """The pipeline, split between the processes that torchrun started, and how long it took, in milliseconds.

    Raises:
        ModelNotLoaded: says what is missing or wrong.
        UnsupportedModel, ConfigError: it cannot be split so.
    """
    from ditattn.hosts.diffusers.load import load_pipeline

    settings = job.settings
    with timed(f"load {job.model.pipeline} ({str(job.dtype).removeprefix('torch.')}, {job.device})") as loading:
        pipe = load_pipeline(
            job.model.path,
            dtype=job.dtype,
            device=job.device,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    # ditattn draws its own, see cli/progress.py
    pipe.set_progress_bar_config(disable=True)
    if settings.split:
        from ditattn.hosts.diffusers.split import split_denoisers

        split_denoisers(pipe, **settings.split)
    return pipe, loading.duration_ms


def playing_rate(job: Job, pipe: Any) -> int:
    """Frames per second of the result: given, or the model's."""
    from ditattn.hosts.diffusers.call import frame_rate

    return job.value("fps") or frame_rate(pipe)


def pipeline_arguments(job: Job, pipe: Any, prompt: str) -> dict[str, Any]:
    """Arguments of the call; some pipelines want to know the rate too."""
    from ditattn.hosts.diffusers.call import call_defaults

    arguments = job.call_arguments(prompt)
    if "frame_rate" in call_defaults(type(pipe)):
        arguments["frame_rate"] = playing_rate(job, pipe)
    return arguments
