"""Step caches of diffusers beside sparse attention, on the demo model: each alone and both together, at equal steps.

    python -m benchmarks.step_caches                       all caches, one held-out caption, the size that the model is made for
    python -m benchmarks.step_caches --clips 3             medians over three captions
    python -m benchmarks.step_caches --frames 9 --caches first_block,sea

Speed is the CPU time of the whole call (text, denoising, decoding) of the dense run without a cache, divided by that of the run: a ratio
within one process, which other work on the machine disturbs less than wall time. "layers" is the share of self-attention calls that ran.
PSNR is against that dense run of the same caption and seed. The demo model is small and its steps change much, so caches skip less here
than on large models: read the columns against each other, not as a forecast.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.fidelity import scene_of
from demo_model import world
from ditattn.backends.setting import Setting
from ditattn.bench.timing import machine
from ditattn.compare.metrics import pooled_psnr
from ditattn.compare.setting import REFERENCE, Clip
from ditattn.compare.workload import Rendered
from ditattn.hosts.diffusers.demo_model import DEFAULTS, TRAINED
from ditattn.hosts.diffusers.load import load_pipeline
from ditattn.hosts.diffusers.step_cache import add_step_cache, parse_step_cache
from ditattn.hosts.diffusers.workload import PipelineWorkload

# small sizes too
SPARSE = Setting.parse("permuted_sparse_attn", {"sparsity": 0.75, "min_tokens": 0})

CACHES: dict[str, dict[str, Any]] = {
    "first_block": {"threshold": 0.1},
    "sea": {"threshold": 0.25},
    "mag": {"threshold": 0.06},
    "pyramid_attention_broadcast": {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (100, 800)},
    "taylorseer": {"cache_interval": 2, "disable_cache_before_step": 3, "cache_identifiers": [r"blocks\.\d+\.attn1"]},
}
"""Thresholds of diffusers' own documentation where it names one, and the shortest interval where it names none. `mag` needs ratios of the
model too, which a run without a cache measures first."""


@dataclass(frozen=True)
class Line:
    """What one run cost and made.

    Attributes:
        speed: CPU time of the dense run divided by that of this one.
        layers: self-attention calls of this run, as a share of the dense run's.
        psnr: dB against the dense run.
    """

    speed: float
    layers: float
    psnr: float


@dataclass(frozen=True)
class Bench:
    """A pipeline and the size of what it makes."""

    pipe: Any
    frames: int
    steps: int

    def run(self, setting: Setting, clip: Clip, cache: str | None = None, **more: Any) -> tuple[Rendered, float]:
        """A clip, and the CPU seconds that it took."""
        workload = PipelineWorkload(self.pipe, self._arguments)
        with self._cached(cache, more):
            began = time.process_time()
            made = workload.render(setting, clip)
            return made, time.process_time() - began

    def ratios(self, clip: Clip) -> list[float]:
        """What MagCache wants to know of a model: how much the residual grows from step to step, the mean of both branches.

        diffusers prints them at the end of a calibrating run, one list for each branch.
        """
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            self.run(REFERENCE, clip, "mag", calibrate=True)
        lists = [
            ast.literal_eval(line)
            for line in printed.getvalue().splitlines()
            if line.startswith("[") and line.endswith("]") and "." in line
        ]
        return [statistics.fmean(step) for step in zip(*lists, strict=True)]

    def _arguments(self, prompt: str) -> dict[str, Any]:
        size = {"height": world.SIZE_PX, "width": world.SIZE_PX, "num_frames": self.frames}
        return {"prompt": prompt, "num_inference_steps": self.steps, "guidance_scale": DEFAULTS["guidance_scale"], **size}

    @contextlib.contextmanager
    def _cached(self, name: str | None, more: dict[str, Any]) -> Iterator[None]:
        if name is None:
            yield
            return
        keys = {**({} if "calibrate" in more else CACHES[name]), **more}
        switch_off = add_step_cache(self.pipe, parse_step_cache(name, keys), self.steps)
        try:
            yield
        finally:
            switch_off()


def measure(bench: Bench, caches: Sequence[str], clips: Sequence[Clip], tell: Callable[[str], None]) -> dict[tuple[str, bool], list[Line]]:
    """Lines by cache ("" for none) and whether the attention was sparse too."""
    ratios = bench.ratios(clips[0]) if "mag" in caches else []
    lines: dict[tuple[str, bool], list[Line]] = {}
    for clip in clips:
        dense, seconds = bench.run(REFERENCE, clip)
        calls = dense.report.components["transformer"].calls
        for name in ("", *caches):
            more = {"mag_ratios": ratios} if name == "mag" else {}
            for sparse in (False, True):
                if not name and not sparse:
                    continue
                tell(f"{clip.prompt}: {name or 'no cache'}, {'sparse' if sparse else 'dense'}")
                made, took = bench.run(SPARSE if sparse else REFERENCE, clip, name or None, **more)
                share = made.report.components["transformer"].calls / calls
                lines.setdefault((name, sparse), []).append(Line(seconds / took, share, pooled_psnr(made.frames, dense.frames)))
    return lines


def table(lines: dict[tuple[str, bool], list[Line]]) -> str:
    """Markdown: a row for each cache."""
    rows = [
        "| step cache | layers | cache alone: speed | PSNR dB | with sparse attention: speed | PSNR dB |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(name for name, _ in lines):
        both = _medians(lines[name, True])
        alone = _medians(lines[name, False]) if (name, False) in lines else None
        first = f"`{name}` {_words(CACHES[name])}" if name else "none"
        rows.append(
            f"| {first} | {100 * (alone or both).layers:.0f} % | "
            f"{f'{alone.speed:.2f}' if alone else '1'} | {f'{alone.psnr:.1f}' if alone else '-'} | {both.speed:.2f} | {both.psnr:.1f} |"
        )
    return "\n".join(rows)


def _words(keys: dict[str, Any]) -> str:
    shown = {key: value for key, value in keys.items() if not key.endswith("identifiers")}
    return ", ".join(f"{key}={value}" for key, value in shown.items())


def _medians(found: Sequence[Line]) -> Line:
    return Line(*(statistics.median(getattr(line, name) for line in found) for name in ("speed", "layers", "psnr")))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caches", default=",".join(CACHES), help="names, separated by commas")
    parser.add_argument("--clips", type=int, default=1, help="held-out captions")
    parser.add_argument("--frames", type=int, default=world.CLIP_FRAMES)
    parser.add_argument("--steps", type=int, default=DEFAULTS["num_inference_steps"])
    asked = parser.parse_args(arguments)
    pipe = load_pipeline(str(TRAINED), dtype=torch.float32, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    clips = [Clip(world.caption(scene_of(number)), seed=number) for number in range(asked.clips)]
    lines = measure(Bench(pipe, asked.frames, asked.steps), asked.caches.split(","), clips, lambda text: print(text, file=sys.stderr))
    print(table(lines))
    print(f"\n{asked.clips} clip(s) of {asked.frames} frames in {asked.steps} steps; {machine()}")


if __name__ == "__main__":
    main()
