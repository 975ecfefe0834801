"""A clip of the demo model in float32 and in bfloat16: what either takes, how far their pictures are apart, and where the time goes.

    python -m benchmarks.dtypes
    python -m benchmarks.dtypes --profile

CPU time of the process on one thread, which other work on the machine lengthens less than wall time. Eight steps, the first one dense.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.fidelity import scene_of
from benchmarks.step_caches import Bench
from demo_model import world
from ditattn.backends.setting import Setting
from ditattn.bench.timing import machine
from ditattn.compare.metrics import pooled_psnr
from ditattn.compare.setting import REFERENCE, Clip
from ditattn.hosts.diffusers.demo_model import TRAINED
from ditattn.hosts.diffusers.load import load_pipeline

STEPS = 8
SPARSE = {"sparsity": 0.75, "min_tokens": 0, "skip_first_steps": 1, "residual": False}
SETTINGS = {
    "torch_sdpa": REFERENCE,
    "laser_attn": Setting.parse("laser_attn", {}),
    "permuted_sparse_attn": Setting.parse("permuted_sparse_attn", SPARSE),
}


def bench_in(dtype: torch.dtype, frames: int, steps: int) -> Bench:
    pipe = load_pipeline(str(TRAINED), dtype=dtype, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return Bench(pipe, frames, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=world.CLIP_FRAMES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--profile", action="store_true", help="also the operations that take longest")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    clip = Clip(world.caption(scene_of(0)), seed=0)
    frames = {}
    for dtype in (torch.float32, torch.bfloat16):
        bench, dense_s = bench_in(dtype, asked.frames, asked.steps), 0.0
        for name, setting in SETTINGS.items():
            made, seconds = bench.run(setting, clip)
            dense_s = dense_s or seconds
            frames[dtype, name] = made.frames
            print(f"{str(dtype)[6:]:9} {name:21} {seconds:7.2f} s of CPU time, {dense_s / seconds:.2f}x", flush=True)
        for name in ("torch_sdpa", "permuted_sparse_attn") if asked.profile else ():
            with torch.profiler.profile() as profiled:
                bench.run(SETTINGS[name], clip)
            print(name, profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=45), sep="\n")
    for name in SETTINGS:
        between = pooled_psnr(frames[torch.bfloat16, name], frames[torch.float32, name])
        print(f"{name}: {between:.1f} dB between the two dtypes")
    for dtype in (torch.float32, torch.bfloat16):
        lost = pooled_psnr(frames[dtype, "permuted_sparse_attn"], frames[dtype, "torch_sdpa"])
        print(f"{str(dtype)[6:]}: permuted_sparse_attn is {lost:.1f} dB from torch_sdpa")
    print(machine())


if __name__ == "__main__":
    main()
