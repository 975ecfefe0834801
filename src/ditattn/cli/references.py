"""What `compare` and `tune` share: the loaded pipeline as a workload, with its dense references."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from ditattn.cli.job import Job, pipeline_arguments
from ditattn.cli.ranks import rank_group
from ditattn.cli.record import versions
from ditattn.compare.cache import ReferenceCache
from ditattn.compare.measure import References
from ditattn.devices import find_device
from ditattn.errors import BackendUnavailable
from ditattn.packages import TORCHMETRICS

__all__ = ["check_metrics", "dense_references", "origin"]


def check_metrics() -> None:
    """Raise BackendUnavailable unless the packages that measure quality are here."""
    if TORCHMETRICS.missing():
        raise BackendUnavailable(TORCHMETRICS.sentence())


def dense_references(job: Job, pipe: Any, *, cached: bool) -> References:
    """The loaded pipeline as a workload; its dense runs are made when they are needed, or with `cached` taken from earlier runs."""
    from ditattn.hosts.diffusers.demo_model import cache_folder
    from ditattn.hosts.diffusers.workload import PipelineWorkload

    pipe.set_progress_bar_config(disable=True)
    workload = PipelineWorkload(pipe, lambda prompt: pipeline_arguments(job, pipe, prompt), job.settings.strict, rank_group())
    return References(workload, ReferenceCache(cache_folder() / "references") if cached else None, _facts(job, pipe))


def origin(job: Job, references: References) -> dict[str, Any]:
    """What a record says of its origin."""
    facts = references.facts
    return {
        "model": job.model.facts(),
        "settings": job.settings.model_dump(mode="json"),
        "sampling": facts["arguments"],
        **{key: facts[key] for key in ("device", "dtype", "threads", "versions")},
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
        # several processes take other times than one, and round otherwise
        **({"split": job.settings.split} if job.settings.split else {}),
    }


def _plain(value: Any) -> Any:
    """An image as a hash of its pixels."""
    if isinstance(value, (str, int, float, type(None))):
        return value
    return hashlib.sha256(f"{value.size}{value.mode}".encode() + value.tobytes()).hexdigest()
