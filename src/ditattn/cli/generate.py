"""What `ditattn generate` does: check, load, and for every prompt make, write, report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import typer

from ditattn.backends.setting import Setting, StepCache, split_step_cache
from ditattn.cli.job import Job, load, pipeline_arguments, playing_rate, prepare
from ditattn.cli.output import DraftFiles, check_file_name, check_folder, default_name, numbered, write_media
from ditattn.cli.progress import progress_bar
from ditattn.cli.ranks import rank_group, together
from ditattn.cli.record import RunRecord
from ditattn.cli.settings import PIPELINE_KEYS, GenerateSettings
from ditattn.cli.step_cache import one_step_cache
from ditattn.cli.terminal import set_up_messages, timed
from ditattn.devices import find_device
from ditattn.errors import ConfigError
from ditattn.quantization.report import QuantizationReport
from ditattn.quantization.request import Quantization
from ditattn.runtime.report import AttentionReport

__all__ = ["run"]

logger = logging.getLogger("ditattn")


@dataclass(frozen=True)
class GenerateJob:
    """A checked job, and what will be installed."""

    job: Job
    settings: GenerateSettings
    attention: Setting
    quantization: Callable[[], QuantizationReport] | None


def run(settings: GenerateSettings, *, debug: bool = False) -> None:
    """Run the verb.

    Raises:
        DitattnError, OSError: see the modules that check.
    """
    set_up_messages(debug)
    attention = _parse_attention(settings)
    if settings.perf_dump_path:
        _check_dump_path(Path(settings.perf_dump_path))
    job = prepare(settings, [attention])
    _check_file_names(job, settings)
    attention = replace(attention, step_cache=one_step_cache(settings, job))
    with together(settings.num_processes, job.device):
        pipe, load_ms = load(job)
        quantization = _quantize(pipe, attention)
        if attention.step_cache is not None:
            _add_cache(pipe, attention.step_cache, job)
        for number in range(len(settings.prompt)):
            _make_one(GenerateJob(job, settings, attention, quantization), pipe, number, load_ms)


def _quantize(pipe: Any, attention: Setting) -> Callable[[], QuantizationReport] | None:
    """Once for all prompts; nothing needs the plain weights again. Returns what reports it."""
    if attention.quantization is None:
        return None
    from ditattn.hosts.diffusers.quantize import quantize_setting

    with timed(f"quantise ({attention.quantization.name})"):
        return quantize_setting(pipe, attention.quantization, keep_originals=False).report


def _add_cache(pipe: Any, cache: StepCache, job: Job) -> None:
    """For as long as the process lives; diffusers makes it forget at the end of every clip."""
    from ditattn.hosts.diffusers.call import call_defaults
    from ditattn.hosts.diffusers.step_cache import add_step_cache

    add_step_cache(pipe, cache, job.value("num_inference_steps") or call_defaults(type(pipe)).get("num_inference_steps"))


def _parse_quantization(settings: GenerateSettings) -> Quantization | None:
    if settings.quantization is not None:
        return Quantization.from_text(settings.quantization, settings.quantization_skip)
    if settings.quantization_skip:
        raise ConfigError("--quantization-skip needs --quantization mxfp4")
    return None


def _parse_attention(settings: GenerateSettings) -> Setting:
    quantization, (keys, _) = _parse_quantization(settings), split_step_cache(settings.attention_backend_config)
    try:
        return Setting.parse(settings.attention_backend, keys, settings.component_attention_backends, quantization)
    except ConfigError as error:
        if settings.attention_backend is not None:
            raise
        raise type(error)(f"{error} (no --attention-backend is named)") from None


def _check_dump_path(path: Path) -> None:
    check_folder(path.parent, "--perf-dump-path")
    if path.is_dir():
        raise ConfigError(f"--perf-dump-path: {path} is a folder; name a .json file")


def _check_file_names(job: Job, settings: GenerateSettings) -> None:
    """Does the file name fit what will be made, and does the dump go elsewhere?"""
    if job.suffix is None or settings.output_file_name is None:
        return
    result = Path(settings.output_path) / (check_file_name(settings.output_file_name, job.suffix) + job.suffix)
    if not settings.perf_dump_path:
        return
    dump = Path(settings.perf_dump_path)
    # with several prompts all three names get the same numbers
    for other, what in ((result, "the result"), (result.with_suffix(".json"), "the record of the run")):
        if dump.resolve() == other.resolve():
            raise ConfigError(f"--perf-dump-path: {dump} is where {what} will be written; name another file")


def _make_one(request: GenerateJob, pipe: Any, number: int, load_ms: float) -> None:
    from ditattn.hosts.diffusers.call import call_defaults, call_pipeline
    from ditattn.hosts.diffusers.install import install_setting

    job, settings, prompt = request.job, request.settings, request.settings.prompt[number]
    arguments, fps = pipeline_arguments(job, pipe, prompt), playing_rate(job, pipe)
    handle = install_setting(pipe, request.attention, strict=settings.strict)
    with handle, timed("denoise and decode"), progress_bar() as progress:
        progress.expect(1)
        progress.begin("denoise" if len(settings.prompt) == 1 else f"denoise, prompt {number + 1} of {len(settings.prompt)}")
        frames, times = call_pipeline(pipe, arguments, seed=settings.seed, on_step=progress.step)
    ranks = rank_group()
    reports = ranks.all_gather(handle.report())
    if not ranks.is_first:
        return
    path = _output_file(settings, number, ".mp4" if len(frames) > 1 else ".png")
    output = _describe(frames, path, fps)
    _warn_about_other_sizes(arguments, output)
    record = RunRecord(
        model=job.model.facts(),
        given=settings.model_dump(exclude_unset=True),
        effective={**_effective(job, arguments, call_defaults(type(pipe)), output, handle.report()), **_cache(request.attention)},
        device={"type": job.device.type, "name": find_device(job.device).device_name()},
        dtype=str(job.dtype).removeprefix("torch."),
        seed=settings.seed,
        prompt=prompt,
        output=output,
        load_ms=load_ms,
        times=times,
        attention=handle.report(),
        ranks=reports if ranks.size > 1 else [],
        quantization=None if request.quantization is None else request.quantization(),
    )
    _write(record, path, frames, settings, number)
    typer.echo(record.summary())


def _output_file(settings: GenerateSettings, number: int, suffix: str) -> Path:
    folder, name = Path(settings.output_path), settings.output_file_name
    if name is None:
        prompt = settings.prompt[number]
        return folder / (default_name(prompt, f"{number} {settings.model_dump_json()}") + suffix)
    return numbered(folder / (check_file_name(name, suffix) + suffix), number, len(settings.prompt))


def _describe(frames: np.ndarray[Any, Any], path: Path, fps: int) -> dict[str, Any]:
    num_frames, height, width, _ = frames.shape
    return {"file": str(path), "height": height, "width": width, "num_frames": num_frames, "fps": fps if num_frames > 1 else None}


def _warn_about_other_sizes(arguments: dict[str, Any], output: dict[str, Any]) -> None:
    """For pipelines whose rounding we do not know beforehand."""
    for key in ("height", "width", "num_frames"):
        if arguments.get(key) not in (None, output[key]):
            logger.warning("%s %s was asked for, the pipeline made %s", key, arguments[key], output[key])


def _cache(attention: Setting) -> dict[str, Any]:
    """The step cache that was on, as settings."""
    cache = attention.step_cache
    return {"cache": None, "cache_config": {}} if cache is None else {"cache": cache.name, "cache_config": dict(cache.keys)}


def _effective(
    job: Job, arguments: dict[str, Any], defaults: dict[str, Any], output: dict[str, Any], attention: AttentionReport
) -> dict[str, Any]:
    """Every setting as it held: given, or chosen by the model, the pipeline or the machine."""
    sampling = {key: arguments.get(key, defaults.get(key)) for key in PIPELINE_KEYS}
    return {
        **job.settings.model_dump(),
        **sampling,
        **{key: output[key] for key in ("height", "width", "num_frames", "fps")},
        "model_path": job.model.path,
        "device": str(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "attention_backend": {name: component.backend for name, component in attention.components.items()},
        "attention_backend_config": {name: component.config for name, component in attention.components.items()},
        "output_file_name": Path(output["file"]).name,
    }


def _write(record: RunRecord, path: Path, frames: np.ndarray[Any, Any], settings: GenerateSettings, number: int) -> None:
    """Result, performance dump, side-car: all or nothing, the side-car last."""
    with DraftFiles() as files:
        with timed("write") as writing:
            write_media(files.draft(path), frames, record.output["fps"])
        record.write_ms = writing.duration_ms
        if settings.perf_dump_path:
            dump = numbered(Path(settings.perf_dump_path), number, len(settings.prompt))
            files.draft(dump).write_text(_json(record.perf_dump()), encoding="utf-8")
        files.draft(path.with_suffix(".json")).write_text(_json(record.sidecar()), encoding="utf-8")
        files.commit()


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
