"""The loaded pipeline of a job, and the arguments of its call."""

from __future__ import annotations

from typing import Any

from ditattn.cli.job import Job
from ditattn.cli.messages import stage

__all__ = ["load", "pipeline_arguments", "playing_rate"]


def load(job: Job) -> tuple[Any, float]:
    """The pipeline, and how long it took, in milliseconds.

    Raises:
        ModelNotLoaded: says what is missing or wrong.
    """
    from ditattn.hosts.diffusers.load import load_pipeline

    settings = job.settings
    with stage(f"load {job.model.pipeline} ({str(job.dtype).removeprefix('torch.')}, {job.device})") as loading:
        pipe = load_pipeline(
            job.model.path,
            dtype=job.dtype,
            device=job.device,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    pipe.set_progress_bar_config(desc="denoise", unit="step")
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
