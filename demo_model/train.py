"""Train transformer and text encoder together by flow matching, on the CPU, in stages of growing clips.

    python -m demo_model.train --out DIR [--stages 1200x16x1,2000x4x5@4,2000x1x17]

A stage is steps x clips x frames; @n takes every n-th frame. The state (DIR/state.pt) is written every `--save-minutes` and at the end;
started again with the same --out, training goes on from there and draws what it would have drawn. Averaged weights go to DIR/pipeline,
a folder that the stock `WanPipeline` loads; the losses go to DIR/log.jsonl.
"""

import argparse
import copy
import json
import math
import random
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from demo_model import forward, world
from demo_model.autoencoder import LatentMap
from demo_model.build import build_pipeline, save_pipeline
from demo_model.hints import Hints, Truth, truth

MUON_LR = 6e-3
ADAMW_LR = 1e-3
WARMUP_STEPS = 50
# share of the object's extra weight that is lost at full noise
OBJECT_FADE = 0.8
# weight of the hints beside the picture's own loss; falls with the learning rate
HINT_WEIGHT = 0.3
EMA_DECAY = 0.995
# how much further most noise levels are shifted
DECISIVE_SHIFT = 2.5
CAPTION_DROP = 0.1
# room for the longest caption and its end mark
CAPTION_TOKENS = 12
LONGEST_PADDING = 500
LOG_STEPS = 20


@dataclass(frozen=True)
class Stage:
    """So many steps with batches of so many clips of so many frames, every `stride`-th of a clip from its first."""

    steps: int
    clips: int
    frames: int
    stride: int = 1

    @property
    def shift(self) -> float:
        """Timestep shift: more frames tell the same scene more often, so it is decided at higher noise."""
        return 2.5 * math.sqrt(self.frames)


def parse_stages(text: str) -> list[Stage]:
    """'1200x16x1,2000x4x5@4' to stages."""
    stages = []
    for part in text.split(","):
        sizes, _, stride = part.partition("@")
        steps, clips, frames = map(int, sizes.split("x"))
        stages.append(Stage(steps, clips, frames, int(stride or 1)))
    return stages


@dataclass(frozen=True)
class Batch:
    """Clean latents [B, 12, T, Y, X], weights of the loss [B, 1, T, Y, X], caption ids and mask [B, L], frame times [T], answers."""

    latents: Tensor
    weights: Tensor
    ids: Tensor
    mask: Tensor
    frames: Tensor
    truth: Truth


def object_weights(mask: Tensor, factor: float) -> Tensor:
    """Weights of the loss from the pixel mask [B, 1, T, Y, X]: `factor` on latents in or beside the object, 1 elsewhere."""
    near = torch.nn.functional.max_pool3d(mask, (1, 4, 4), (1, 2, 2), (0, 1, 1))
    return 1 + (factor - 1) * near


def draw_batch(stage: Stage, rng: random.Random, tokenizer: Any, latent_map: LatentMap, object_factor: float) -> Batch:
    """Draw clips of training scenes; some captions are empty, for guidance."""
    scenes = rng.choices(world.training_scenes(), k=stage.clips)
    frames = torch.arange(stage.frames) * stage.stride
    clips = [world.place(scene, rng) for scene in scenes]
    video, mask = world.render(clips, frames)
    captions = ["" if rng.random() < CAPTION_DROP else world.caption(scene, big=rng.random() < 0.5) for scene in scenes]
    tokens = tokenizer(captions, padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt")
    latents, weights = latent_map.encode(video), object_weights(mask, object_factor)
    return Batch(latents, weights, tokens.input_ids, tokens.attention_mask, frames, truth(clips, frames, captions))


def draw_sigma(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels [B], shifted towards noise: for 30 % of the clips uniform, for the others logistic-normal and shifted further.

    Edges and colours are learned soon; whether there is an object, and where, is decided in the noisiest hundredths, and takes longest.
    """
    peaked = torch.sigmoid(1.2 * torch.randn(batch, generator=generator))
    flat, coin = torch.rand(batch, generator=generator), torch.rand(batch, generator=generator)
    u, shifts = torch.where(coin < 0.7, peaked, flat), torch.where(coin < 0.7, DECISIVE_SHIFT * shift, shift)
    return (shifts * u / (1 + (shifts - 1) * u)).clamp(1e-3, 1.0)


class Trainer:
    """Networks, their averages, hints, optimisers and the number of steps done; every step draws from its own seed."""

    def __init__(self, pipe: Any, seed: int, object_factor: float) -> None:
        self.pipe, self.seed, self.object_factor, self.step = pipe, seed, object_factor, 0
        self.latent_map = LatentMap(pipe.vae)
        self.nets = torch.nn.ModuleDict({"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}).train()
        self.averages = copy.deepcopy(self.nets).requires_grad_(False)
        self.hints = Hints(pipe.transformer.proj_out.in_features, len(pipe.transformer.blocks))
        matrices = [p for name, p in pipe.transformer.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
        taken = {id(p) for p in matrices}
        others = [p for p in (*self.nets.parameters(), *self.hints.parameters()) if id(p) not in taken]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def losses(self, stage: Stage) -> tuple[Tensor, Tensor]:
        """The weighted flow-matching error of this step's batch, and the error of the hints."""
        rng = random.Random(f"{self.seed} {self.step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        batch = draw_batch(stage, rng, self.pipe.tokenizer, self.latent_map, self.object_factor)
        sigma = draw_sigma(stage.clips, stage.shift, generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        s = sigma.view(-1, 1, 1, 1, 1)
        num_pad = math.exp(rng.uniform(0, math.log(LONGEST_PADDING)))
        noisy = (1 - s) * batch.latents + s * noise
        networks = (self.nets["transformer"], self.nets["text_encoder"])
        hidden: list[Tensor] = []
        guess = forward.velocity(*networks, noisy, sigma, batch.ids, batch.mask, num_pad, batch.frames, hidden=hidden)
        # where noise still hides the object, a high weight floods the picture with object and a low one leaves it out
        weights = 1 + (1 - OBJECT_FADE * s) * (batch.weights - 1)
        picture = ((guess - (noise - batch.latents)).square() * weights).mean() / weights.mean()
        return picture, self.hints(hidden, batch.truth)

    def train_step(self, stage: Stage, lr_factor: float) -> tuple[float, float, float]:
        """One step; returns both losses and the norm of the networks' gradient before clipping."""
        picture, hint = self.losses(stage)
        torch.autograd.backward(picture + HINT_WEIGHT * lr_factor * hint)
        norm = torch.nn.utils.clip_grad_norm_(self.nets.parameters(), 1.0)
        for optimizer, lr in zip(self.optimizers, (MUON_LR, ADAMW_LR), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * lr_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averages.parameters()), list(self.nets.parameters()), 1 - decay)
        return picture.item(), hint.item(), norm.item()

    def save(self, folder: Path) -> None:
        """Write the state for a later resume and the averaged weights as a pipeline."""
        state = {
            "step": self.step,
            "nets": self.nets.state_dict(),
            "averages": self.averages.state_dict(),
            "hints": self.hints.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        # a kill while writing must not cost the old state
        torch.save(state, folder / "state.tmp")
        (folder / "state.tmp").replace(folder / "state.pt")
        parts = {name: self.pipe.components[name] for name in ("tokenizer", "vae", "scheduler")}
        save_pipeline(type(self.pipe)(**parts, **dict(self.averages.items())), folder / "pipeline")

    def resume(self, folder: Path) -> None:
        """Go on from a state that `save` wrote."""
        state = torch.load(folder / "state.pt", weights_only=True)
        self.step = state["step"]
        self.nets.load_state_dict(state["nets"])
        self.averages.load_state_dict(state["averages"])
        self.hints.load_state_dict(state["hints"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def stage_at(stages: Sequence[Stage], step: int) -> Stage | None:
    """The stage that a step belongs to; None when all are done."""
    for stage in stages:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return None


def lr_factor_at(step: int, total: int, decay_steps: int) -> float:
    """Linear warm-up, then constant, then linear to 5 % over the last `decay_steps` steps."""
    left = (total - step) / max(1, decay_steps)
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.05 + 0.95 * min(1.0, left))


def run(trainer: Trainer, stages: Sequence[Stage], folder: Path, decay_steps: int, save_minutes: float) -> None:
    """Train from the trainer's step to the end of the last stage; asked to terminate, save and leave."""
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    total, recent, saved_at = sum(stage.steps for stage in stages), deque[tuple[float, float, float]](maxlen=LOG_STEPS), time.monotonic()
    with (folder / "log.jsonl").open("a") as log:
        while not stop and (stage := stage_at(stages, trainer.step)) is not None:
            recent.append(trainer.train_step(stage, lr_factor_at(trainer.step, total, decay_steps)))
            if trainer.step % LOG_STEPS == 0:
                means = (round(sum(values) / len(recent), 4) for values in zip(*recent, strict=True))
                row = {"step": trainer.step, "clips": stage.clips, "frames": stage.frames}
                row |= dict(zip(("loss", "hint_loss", "norm"), means, strict=True)) | {"cpu_s": round(time.process_time())}
                print(json.dumps(row), file=log, flush=True)
            if time.monotonic() - saved_at > 60 * save_minutes:
                trainer.save(folder)
                saved_at = time.monotonic()
    trainer.save(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", type=parse_stages, default="1200x16x1,2000x4x5@4,2000x1x17")
    parser.add_argument("--decay-steps", type=int, default=1600, help="length of the falling learning rate at the end")
    parser.add_argument(
        "--object-factor", type=float, default=3.0, help="weight of the loss on and beside the object, without noise; fades with noise"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-minutes", type=float, default=3.0)
    parser.add_argument("--compile", action="store_true", help="compile the blocks: about a minute per stage, then faster steps")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(build_pipeline(args.seed), args.seed, args.object_factor)
    if (args.out / "state.pt").exists():
        trainer.resume(args.out)
    if args.compile:
        forward.run_block = torch.compile(forward.run_block, dynamic=False)
    run(trainer, args.stages, args.out, args.decay_steps, args.save_minutes)


if __name__ == "__main__":
    main()
