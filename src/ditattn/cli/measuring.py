"""What `compare` and `tune` share: the job, the loaded pipeline as a workload, the dense references."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ditattn.backends.setting import Setting
from ditattn.cli.job import Job, prepare
from ditattn.cli.loaded import load, pipeline_arguments
from ditattn.cli.machine import check_backends
from ditattn.cli.records import versions
from ditattn.cli.settings import CallSettings, GenerateSettings
from ditattn.compare.cache import ReferenceCache
from ditattn.compare.measure import References
from ditattn.devices import find_device
from ditattn.errors import BackendUnavailable
from ditattn.packages import TORCHMETRICS

if TYPE_CHECKING:
    from ditattn.hosts.diffusers.workload import PipelineWorkload

__all__ = ["Bench", "about", "check_settings", "job_of", "set_up"]


@dataclass(frozen=True)
class Bench:
    """A loaded pipeline with its dense references.

    Attributes:
        facts: everything but the clip that can change a run.
    """

    job: Job
    workload: PipelineWorkload
    references: References
    facts: dict[str, Any]


def job_of(settings: CallSettings) -> Job:
    """Check what can be checked before weights are loaded.

    Raises:
        ConfigError, BackendUnavailable, ModelNotLoaded: something cannot be honoured.
    """
    if TORCHMETRICS.missing():
        raise BackendUnavailable(TORCHMETRICS.sentence())
    known = {key: getattr(settings, key) for key in CallSettings.model_fields if key in settings.model_fields_set}
    components: dict[str, Any] = {"component_attention_backends": {}, "output_file_name": None}
    return prepare(GenerateSettings(**{**known, **components, "attention_backend": "torch_sdpa"}))


def check_settings(job: Job, settings: Sequence[Setting]) -> None:
    """Are the backends of these settings here?

    Raises:
        BackendUnavailable: as `install` would, but before the model is loaded.
    """
    for setting in settings:
        check_backends(setting, job.device, job.dtype)


def set_up(job: Job, *, strict: bool, cached: bool) -> Bench:
    """Load the pipeline.

    Raises:
        ModelNotLoaded: says what is missing or wrong.
    """
    from ditattn.hosts.diffusers.demo_model import cache_folder
    from ditattn.hosts.diffusers.workload import PipelineWorkload

    pipe, _ = load(job)
    pipe.set_progress_bar_config(disable=True)
    workload = PipelineWorkload(pipe, lambda prompt: pipeline_arguments(job, pipe, prompt), strict)
    facts = _facts(job, pipe)
    cache = ReferenceCache(cache_folder() / "references") if cached else None
    return Bench(job, workload, References(workload, cache, facts), facts)


def about(bench: Bench, settings: CallSettings) -> dict[str, Any]:
    """What a record says of its origin."""
    job = bench.job
    return {
        "model": job.model.facts(),
        "settings": settings.model_dump(mode="json"),
        "sampling": bench.facts["arguments"],
        "device": bench.facts["device"],
        "dtype": bench.facts["dtype"],
        "threads": bench.facts["threads"],
        "versions": bench.facts["versions"],
    }


def _facts(job: Job, pipe: Any) -> dict[str, Any]:
    from ditattn.hosts.diffusers.fingerprint import model_fingerprint

    arguments = pipeline_arguments(job, pipe, "")
    return {
        "model": str(Path(job.model.path).expanduser().resolve()) if Path(job.model.path).expanduser().exists() else job.model.path,
        "fingerprint": model_fingerprint(job.model.path, job.settings.revision),
        "pipeline": job.model.pipeline,
        "arguments": {key: _plain(value) for key, value in arguments.items() if key != "prompt"},
        "dtype": str(job.dtype).removeprefix("torch."),
        "device": {"type": job.device.type, "name": find_device(job.device).device_name()},
        "threads": torch.get_num_threads() if job.device.type == "cpu" else None,
        "versions": versions(),
    }


def _plain(value: Any) -> Any:
    """An image as a hash of its pixels."""
    if isinstance(value, (str, int, float, type(None))):
        return value
    return hashlib.sha256(f"{value.size}{value.mode}".encode() + value.tobytes()).hexdigest()
