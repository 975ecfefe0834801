"""The laboratory of fidelity: what methods of sparse attention do to the picture where they compute equally much.

    python -m benchmarks.fidelity                          all methods, three shares, six held-out captions: an hour or two
    python -m benchmarks.fidelity --quick                  the three main methods, two shares, two captions: about ten minutes
    python -m benchmarks.fidelity --plot fidelity.svg      also draw PSNR against the computed share
    python -m benchmarks.fidelity --frames 33 --steps 12   the same questions of other clips: does the ranking hold?

A method's sparsity is adjusted until the share of query-key pairs that the whole run computes, dense first steps included, is the one
asked for. Every clip is compared with the dense run of the same caption and seed. What was measured goes to --out at once, a JSON line per
method, share and clip; a later call does not run again what it finds there, so interrupt it when you like.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fidelity_methods import MAIN, METHODS, Method, bounds_registered, methods_named, recalls
from benchmarks.fidelity_table import Line, append_line, draw, question_of, read_lines, table
from demo_model import world
from demo_model.judge import judge
from demo_model.sample import GUIDANCE, STEPS, TEXT_TOKENS, load
from ditattn.backends.config import SparseAttentionConfig, resolve_steps
from ditattn.backends.residuals import refreshes, without_residual
from ditattn.bench.timing import machine
from ditattn.compare.cache import ReferenceCache
from ditattn.compare.measure import References
from ditattn.compare.metrics import frame_ssim, pooled_psnr
from ditattn.compare.run import run_clip
from ditattn.compare.setting import Clip
from ditattn.errors import ConfigError, DitattnError, UnsupportedCall
from ditattn.hosts.diffusers.demo_model import TRAINED, cache_folder
from ditattn.hosts.diffusers.fingerprint import model_fingerprint
from ditattn.hosts.diffusers.workload import PipelineWorkload

RESULTS = Path(__file__).parent / "results/fidelity.jsonl"

SHARES = (0.66, 0.49, 0.38)
TOLERANCE = 0.01
# a calibration that comes this near is good enough
NEAR = 0.002
CALIBRATION_RUNS = 10
MOST_SPARSE = 0.995

CLIPS = 6
# held-out scenes are dealt by shape and direction in turn: so many further, a few clips show them all. No divisor of their number
STRIDE = 7


@dataclass(frozen=True)
class Size:
    """What is drawn: frames and pixels, in so many steps."""

    frames: int = world.CLIP_FRAMES
    height: int = world.SIZE_PX
    width: int = world.SIZE_PX
    steps: int = STEPS


def scene_of(number: int) -> world.Scene:
    """The scene of clip `number`, one that training never saw."""
    scenes = world.held_out_scenes()
    return scenes[number * STRIDE % len(scenes)]


@dataclass(frozen=True)
class Laboratory:
    """A model, and what is asked of it.

    Attributes:
        model: a folder of the demo model, or of other weights of its kind.
        cache: folder of the dense references.
        results: the file of JSON lines.
        tell: is told what begins.
    """

    size: Size
    model: Path
    cache: Path
    results: Path
    tell: Callable[[str], None]

    def measure(self, methods: Sequence[Method], shares: Sequence[float], clips: int, anew: bool = False) -> list[Line]:
        """The lines of every method, share and clip: those that are there, and new ones; with `anew` only new ones."""
        known = {} if anew else {question_of(line): line for line in read_lines(self.results)}
        lines: list[Line] = []
        # a whole row of the table after another, so that an interrupted run has whole rows
        for share in shares:
            for method in methods:
                row: list[Line] = []
                for number in range(clips):
                    question = self._question(method, share, number)
                    if question_of(question) not in known:
                        sparsity = row[0]["sparsity"] if row else self.sparsity_for(method, share)
                        self.tell(f"{method.name}, share {share:g}, clip {number + 1} of {clips}")
                        line = question | self._answer(method, sparsity, number)
                        append_line(self.results, line)
                        known[question_of(line)] = line
                    row.append(known[question_of(question)])
                self._warn_of_share(method, share, row)
                lines += row
        return lines

    def sparsity_for(self, method: Method, share: float) -> float:
        """The sparsity at which the whole run computes `share` of all pairs, as nearly as the method's steps allow.

        One sparse step is enough to see what a sparsity computes: it does not depend on the picture.

        Raises:
            ConfigError: the dense steps alone compute more.
        """
        config = method.setting(0.5).config
        assert isinstance(config, SparseAttentionConfig)
        dense = (resolve_steps(config.skip_first_steps, self.size.steps) or 0) / self.size.steps
        if not dense < share < 1:
            raise ConfigError(f"a computed share of {share:g} is not possible: the dense steps compute {dense:.2f}, and 1 is everything")
        self.tell(f"{method.name}, share {share:g}: looking for the sparsity")
        return nearest_sparsity(lambda sparsity: self._share(method, sparsity), share, NEAR)

    def _share(self, method: Method, sparsity: float) -> float:
        """What a whole run computes."""
        steps, config = self.size.steps, method.setting(sparsity).config
        assert isinstance(config, SparseAttentionConfig)
        first = resolve_steps(config.skip_first_steps, steps) or 0
        spent = (
            refreshes(sparsity, first, steps, is_video=self.size.frames > 1)
            if getattr(config, "residual", False)
            else without_residual(sparsity)
        )
        dense = first + len(spent.steps)
        return (dense + (steps - dense + len(spent.before_sparse)) * self._density(method, spent.sparsity)) / steps

    def _density(self, method: Method, sparsity: float) -> float:
        """What one sparse step computes."""
        setting = method.setting(sparsity).with_keys(skip_first_steps=0)
        return run_clip(self._workload, setting, self._clip(0), num_inference_steps=1, guidance_scale=1.0).overall_density or 0.0

    def _question(self, method: Method, share: float, number: int) -> dict[str, Any]:
        """Everything that a line is found again by."""
        clip = self._clip(number)
        asked = {"method": method.name, "backend": method.backend, "keys": dict(method.keys), "share": share}
        return {**asked, "prompt": clip.prompt, "seed": clip.seed, **vars(self.size), "weights": self._weights}

    def _answer(self, method: Method, sparsity: float, number: int) -> dict[str, Any]:
        """What is measured."""
        clip, scene = self._clip(number), scene_of(number)
        dense = self._references.find(clip) or self._references.make(clip)
        with recalls() as kept:
            run = run_clip(self._workload, method.setting(sparsity), clip)
        psnr = pooled_psnr(run.frames, dense.frames)
        if not kept or math.isinf(psnr):
            raise UnsupportedCall(f"{method.name} drops nothing here, leave it out with --methods: {run.summary}")
        return {
            "sparsity": round(sparsity, 5),
            "ran": round(run.overall_density or 0.0, 5),
            "psnr": round(psnr, 3),
            "ssim": round(float(np.mean(frame_ssim(run.frames, dense.frames))), 5),
            "recall": round(float(torch.stack(kept).mean()), 5),
            "right": is_right(run.frames, scene),
            "dense_right": is_right(dense.frames, scene),
            "machine": self._machine,
        }

    def _warn_of_share(self, method: Method, share: float, row: Sequence[Line]) -> None:
        worst = max((line["ran"] for line in row), key=lambda ran: abs(ran - share))
        if abs(worst - share) > TOLERANCE:
            self.tell(f"{method.name}: share {share:g} was asked for, {worst:.3f} ran; it has none nearer on this grid")

    def _clip(self, number: int) -> Clip:
        return Clip(world.caption(scene_of(number)), number)

    @cached_property
    def _workload(self) -> PipelineWorkload:
        return PipelineWorkload(load(self.model, torch.float32), self._arguments, strict=True)

    @cached_property
    def _references(self) -> References:
        facts = {"weights": self._weights, **vars(self.size), "torch": torch.__version__, "threads": torch.get_num_threads()}
        return References(self._workload, ReferenceCache(self.cache), facts)

    @cached_property
    def _weights(self) -> str:
        return model_fingerprint(str(self.model))[:12]

    @cached_property
    def _machine(self) -> dict[str, Any]:
        return machine()

    def _arguments(self, prompt: str) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "height": self.size.height,
            "width": self.size.width,
            "num_frames": self.size.frames,
            "num_inference_steps": self.size.steps,
            "guidance_scale": GUIDANCE,
            "max_sequence_length": TEXT_TOKENS,
        }


def nearest_sparsity(density: Callable[[float], float], wanted: float, near: float) -> float:
    """The sparsity whose density is nearest to `wanted`; more sparsity never means more density, but it may go down in steps."""
    low, high = (0.0, 1.0), (MOST_SPARSE, density(MOST_SPARSE))
    tried = [high]
    for turn in range(CALIBRATION_RUNS):
        between = (low[1] - wanted) / max(low[1] - high[1], 1e-9)
        # a straight line first; halves end a search among steps
        place = min(max(between, 0.05), 0.95) if turn % 2 == 0 else 0.5
        sparsity = low[0] + (high[0] - low[0]) * place
        tried.append((sparsity, density(sparsity)))
        if abs(tried[-1][1] - wanted) <= near:
            break
        low, high = (tried[-1], high) if tried[-1][1] > wanted else (low, tried[-1])
    return min(tried, key=lambda one: abs(one[1] - wanted))[0]


def is_right(frames: np.ndarray[Any, Any], scene: world.Scene) -> bool | None:
    """Whether the object is right in every respect, but for the motion of an image; None where the picture is no square."""
    if frames.shape[1] != frames.shape[2]:
        return None
    answers = judge(frames / 255).agrees(scene)
    return all(right for question, right in answers.items() if len(frames) > 1 or question != "direction")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="two clips, two shares, three methods, where the options below say nothing else"
    )
    parser.add_argument("--methods", help=f"comma-separated, of {', '.join(method.name for method in METHODS)}")
    parser.add_argument("--shares", help=f"comma-separated computed shares; default {','.join(map(str, SHARES))}")
    parser.add_argument("--clips", type=int, help=f"how many held-out captions, each with its own seed; default {CLIPS}")
    for option in ("--frames", "--height", "--width", "--steps"):
        parser.add_argument(option, type=int, default=getattr(Size, option.removeprefix("--")))
    parser.add_argument("--model", type=Path, default=TRAINED, help="a folder with other weights of the demo model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the file of JSON lines")
    parser.add_argument("--cache", type=Path, default=cache_folder() / "fidelity", help="the folder of dense references")
    parser.add_argument(
        "--anew", action="store_true", help="run what --out has too: after a change of a method, whose old lines say nothing"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    try:
        methods = methods_named(args.methods.split(",") if args.methods else MAIN if args.quick else [method.name for method in METHODS])
        shares = [float(share) for share in args.shares.split(",")] if args.shares else SHARES[1:] if args.quick else SHARES
        clips = args.clips or (2 if args.quick else CLIPS)
        size = Size(**{name: getattr(args, name) for name in vars(Size())})
        lab = Laboratory(size, args.model, args.cache, args.out, lambda text: print(text, file=sys.stderr, flush=True))
        with bounds_registered():
            lines = lab.measure(methods, shares, clips, args.anew)
    except DitattnError as error:
        sys.exit(f"fidelity: {error}")
    print(table(lines))
    if args.plot:
        args.plot.write_text(draw(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
