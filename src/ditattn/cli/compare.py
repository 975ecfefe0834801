"""What `ditattn compare` does: check, load, measure, write the page and the numbers, print the table."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import typer

from ditattn.backends.registry import DEFAULT_BACKEND
from ditattn.backends.setting import Setting, split_step_cache
from ditattn.cli.job import load, playing_rate, prepare
from ditattn.cli.output import DraftFiles, check_plain_name, default_name, numbered, write_media
from ditattn.cli.progress import progress_bar
from ditattn.cli.ranks import this_rank, together
from ditattn.cli.references import check_metrics, dense_references, origin
from ditattn.cli.settings import CompareSettings
from ditattn.cli.step_cache import cache_names, check_cache_config, compared_step_caches
from ditattn.cli.terminal import print_rich, say, set_up_messages
from ditattn.compare.measure import Comparison, compare
from ditattn.compare.page import render_page
from ditattn.compare.record import comparison_record, plain
from ditattn.compare.setting import REFERENCE, Clip, dropped_keys, expand, with_step_caches
from ditattn.errors import ConfigError
from ditattn.quantization.request import Quantization

__all__ = ["run"]

# rows of the terminal's table: key of the statistics, heading, digits, divisor
COLUMNS = (
    ("psnr", "PSNR dB", 2, 1),
    ("ssim", "SSIM", 4, 1),
    ("ms_ssim", "MS-SSIM", 4, 1),
    ("vmaf", "VMAF", 1, 1),
    ("overall_density", "overall density", 3, 1),
    ("attention_calls", "calls", 3, 1),
    ("attention_ms", "attention s", 2, 1000),
    ("total_ms", "all s", 2, 1000),
    ("speed_up", "speed-up", 2, 1),
)


def run(settings: CompareSettings, *, debug: bool = False) -> None:
    """Run the verb.

    Raises:
        DitattnError, OSError: see the modules that check.
    """
    set_up_messages(debug)
    check_cache_config(settings)
    if not settings.attention_backend and not settings.quantization and not cache_names(settings):
        raise ConfigError(
            "what shall be compared? Name it: --attention-backend rain_fusion_attn (the reference is torch_sdpa), --quantization or --cache"
        )
    name = _file_name(settings)
    check_metrics()
    attention = _parse_attention(settings)
    job = prepare(settings, [REFERENCE, *attention])
    attention = with_step_caches(attention, compared_step_caches(settings, job))
    with together(settings.num_processes, job.device):
        pipe, _ = load(job)
        clips = [Clip(prompt, seed) for prompt in settings.prompt for seed in settings.seed]
        with progress_bar() as progress:
            references = dense_references(job, pipe, cached=settings.reference_cache, progress=progress)
            comparison = compare(references, attention, clips, repeats=settings.repeats, probe=settings.probe, progress=progress)
        if this_rank().is_first:
            _tell(settings, name, comparison, origin(job, references), playing_rate(job, pipe))


def _tell(settings: CompareSettings, name: str, comparison: Comparison, made_by: Mapping[str, Any], fps: int) -> None:
    """Write the files, print the table."""
    record = comparison_record(comparison, {**_made(comparison, fps), **made_by}, settings.target_psnr)
    folder = Path(settings.output_path)
    videos = _clip_files(comparison, record, folder, name) if settings.save_videos else {}
    page, numbers = _write(comparison, record, folder, name, fps, videos)
    _print_table(record)
    if any(clip["cached"] for clip in record["reference"]["clips"]):
        say("dense runs and their times are kept ones of an earlier moment, so speed-ups are too; --no-reference-cache makes them anew")
    if this_rank().count > 1:
        say(f"densities are means over the {this_rank().count} processes; times, memory and sparse density are those of the first")
    typer.echo(f"wrote {page} and {', '.join(path.name for path in (numbers, *videos))}")


def _parse_attention(settings: CompareSettings) -> list[Setting]:
    """Every backend with the keys that it has; keys that no named backend has stay, to be refused with the rest."""
    configs, grid = [split_step_cache(config)[0] for config in settings.attention_backend_config], settings.grid
    # quantisation or a step cache alone leaves the attention as it is in the reference
    backends = settings.attention_backend or [DEFAULT_BACKEND]
    expanded = expand(backends, configs, grid, settings.component_attention_backends, _parse_quantizations(settings))
    for backend in dict.fromkeys(backends):
        if dropped := dropped_keys(backend, (key for mapping in (*configs, grid) for key in mapping), backends):
            say(f"{backend} has no {', '.join(dropped)}: it is compared without")
    return expanded


def _parse_quantizations(settings: CompareSettings) -> list[Quantization | None]:
    """What --quantization names; "none" is among them where somebody wants it beside others."""
    if settings.quantization_skip and not settings.quantization:
        raise ConfigError("--quantization-skip needs --quantization mxfp4")
    skip = settings.quantization_skip
    return [None if text.lower() == "none" else Quantization.from_text(text, skip) for text in settings.quantization] or [None]


def _file_name(settings: CompareSettings) -> str:
    name = settings.output_file_name
    if name is None:
        return "compare_" + default_name(settings.prompt[0], settings.model_dump_json())
    name = name.removesuffix(".html").removesuffix(".json")
    check_plain_name(name)
    return name


def _made(comparison: Comparison, fps: int) -> dict[str, Any]:
    num_frames, height, width, _ = comparison.reference[0].runs[0].frames.shape
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "output": {"num_frames": num_frames, "height": height, "width": width, "fps": fps},
    }


def _clip_files(comparison: Comparison, record: Mapping[str, Any], folder: Path, name: str) -> dict[Path, np.ndarray[Any, Any]]:
    """A file for every clip of the reference and of every setting, named after the setting; several clips are numbered."""
    names = ["torch_sdpa", *(setting["name"] for setting in record["settings"])]
    files = {}
    for setting, clips in zip(names, [comparison.reference, *comparison.measured], strict=True):
        words = re.sub(r"[^\w.=-]+", "-", setting)
        for number, clip in enumerate(clips):
            frames = clip.runs[0].frames
            path = folder / f"{name}-{words}{'.mp4' if len(frames) > 1 else '.png'}"
            files[numbered(path, number, len(clips))] = frames
    return files


def _write(
    comparison: Comparison, record: Mapping[str, Any], folder: Path, name: str, fps: int, videos: Mapping[Path, np.ndarray[Any, Any]]
) -> tuple[Path, Path]:
    """Page, numbers and videos: all or none."""

    def encode(frames: np.ndarray[Any, Any]) -> bytes:
        with tempfile.TemporaryDirectory(prefix="ditattn-") as place:
            write_media(Path(place) / "clip.mp4", frames, fps)
            return (Path(place) / "clip.mp4").read_bytes()

    page, numbers = folder / f"{name}.html", folder / f"{name}.json"
    with DraftFiles() as files:
        files.draft(page).write_text(render_page(comparison, record, encode), encoding="utf-8")
        text = json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False)
        files.draft(numbers).write_text(text + "\n", encoding="utf-8")
        for path, frames in videos.items():
            write_media(files.draft(path), frames, fps)
        files.commit()
    return page, numbers


def _print_table(record: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table("setting", box=None, pad_edge=False)
    shown = [column for column in COLUMNS if any(setting["statistics"][column[0]] for setting in record["settings"])]
    for _, heading, _, _ in shown:
        table.add_column(heading, justify="right")
    dense = record["reference"]["clips"]
    costs = {key: float(np.median([clip[key] for clip in dense])) for key in ("attention_ms", "total_ms")}
    table.add_row("torch_sdpa", *(f"{costs[key] / divisor:.{digits}f}" if key in costs else "" for key, _, digits, divisor in shown))
    for setting in record["settings"]:
        table.add_row(setting["name"], *(_cell(setting["statistics"][key], digits, divisor) for key, _, digits, divisor in shown))
    print_rich(table)
    typer.echo(record["verdict"])
    if len(record["clips"]) > 1:
        typer.echo(f"medians over {len(record['clips'])} clips, each against its own reference; in brackets the worst")


def _cell(found: Mapping[str, Any] | None, digits: int, divisor: float) -> str:
    if found is None:
        return "-"
    median, worst = (f"{found[key] / divisor:.{digits}f}" for key in ("median", "worst"))
    return median if found["count"] == 1 else f"{median} ({worst})"
