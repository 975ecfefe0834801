"""Steps of a whole denoiser at its real size, with random weights: what a backend saves where everything else takes its time too.

    python -m benchmarks.denoiser --model wan2.1-1.3b-480p-81f --sparsity 0.66

Weights are random, so the pictures mean nothing and no quality is measured; times and memory do not depend on them. Every setting makes a
run of its own with classifier-free guidance; a row gives the median of its dense and of its sparse steps, and the peak of memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ditattn

TEXT_TOKENS, TEXT_DIM = 512, 4096


@dataclass(frozen=True)
class Model:
    """Layers, heads of 128, width of the feed-forward part, and the video in pixels."""

    layers: int
    heads: int
    feed_forward: int
    height: int
    width: int
    frames: int = 81


MODELS = {
    "wan2.1-1.3b-480p-81f": Model(30, 12, 8960, 480, 832),
    "wan2.1-14b-720p-81f": Model(40, 40, 13824, 720, 1280),
    "tiny": Model(2, 2, 256, 64, 96, 9),
}


def pipeline(model: Model, device: str, dtype: torch.dtype) -> Any:
    """A WanPipeline without text encoder, whose VAE serves for its sizes alone."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    with torch.device(device):
        transformer = WanTransformer3DModel(num_attention_heads=model.heads, num_layers=model.layers, ffn_dim=model.feed_forward)
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer.to(dtype).eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def step_seconds(pipe: Any, model: Model, num_steps: int) -> list[float]:
    """Seconds of every step of a run."""
    device, dtype = pipe.transformer.device, pipe.transformer.dtype
    embeds: list[Tensor] = [
        torch.randn(1, TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(seed)).to(device, dtype) for seed in range(2)
    ]
    marks: list[float] = []

    def mark(*_: Any) -> dict[str, Any]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return {}

    mark()
    pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        height=model.height,
        width=model.width,
        num_frames=model.frames,
        num_inference_steps=num_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        callback_on_step_end=mark,
    )
    return [after - before for before, after in itertools.pairwise(marks)]


def measure(pipe: Any, model: Model, num_steps: int, settings: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each backend and its keys."""
    step_seconds(pipe, model, 2)
    for backend, keys in settings.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with ditattn.install(pipe, backend, **keys) as handle:
            seconds = step_seconds(pipe, model, num_steps)
        report = handle.report().components["transformer"]
        dense = [step for step in range(num_steps) if report.sparse_density_by_step.get(step) is None]
        sparse = [step for step in range(num_steps) if step not in dense]
        yield {
            "backend": backend,
            "steps": [round(one, 4) for one in seconds],
            "dense_step_s": round(statistics.median([seconds[step] for step in dense]), 4) if dense else None,
            "sparse_step_s": round(statistics.median([seconds[step] for step in sparse]), 4) if sparse else None,
            "run_s": round(sum(seconds), 3),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None,
            "report": handle.report().summary(),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="wan2.1-1.3b-480p-81f")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--sparsity", type=float, default=0.66)
    parser.add_argument("--backends", default="torch_sdpa,fa,permuted_sparse_attn,rain_fusion_attn")
    arguments = parser.parse_args()
    model = MODELS[arguments.model]
    pipe = pipeline(model, arguments.device, torch.bfloat16)
    settings: dict[str, dict[str, Any]] = {}
    for backend in arguments.backends.split(","):
        sparse = ditattn.AttentionBackendEnum.parse(backend).is_sparse
        settings[backend] = {"sparsity": arguments.sparsity, "min_tokens": 0} if sparse else {}
    for row in measure(pipe, model, arguments.steps, settings):
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
