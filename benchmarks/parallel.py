"""The demo model's clip on several processes of this machine: is it the same, how long do attention and exchanges take, who waits for whom.

    python -m benchmarks.parallel                     # 1, 2 and 4 processes, Ulysses, dense and the recommended backend
    python -m benchmarks.parallel --ring --backend rain_fusion_attn
    python -m benchmarks.parallel --count-pairs       # balance of a ring at the size of real videos, counted without running it

Processes talk through gloo on the CPU, and through nccl or hccl where there are as many devices as processes. On a CPU they share cores, so
that times show who waits, not what several devices save. PSNR is against the first number of processes with the same backend, and against a
dense clip of one process: permuted_sparse_attn has a budget for each rank, and under ring parts of blocks are a rank's own, so there the
clip may differ. Bytes are computed from shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import ditattn
from benchmarks.kept_pairs import print_balance
from ditattn.compare.metrics import pooled_psnr
from ditattn.hosts.diffusers.call import call_pipeline
from ditattn.hosts.diffusers.demo_model import DEFAULTS, find_demo_model
from ditattn.hosts.diffusers.load import load_pipeline
from ditattn.hosts.diffusers.split import split_denoisers

PROMPT = "a big red circle moves right on a blue background"
BACKENDS = ("torch_sdpa", "permuted_sparse_attn")
SPARSE_BACKENDS = ("block_sparse_attn", "rain_fusion_attn", "permuted_sparse_attn")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options().parse_args(arguments)
    if options.rank_writes_to is not None:
        _run_rank(options)
        return
    if options.count_pairs:
        print_balance(options.backend or SPARSE_BACKENDS, options.processes or (2, 4, 8), options.sparsity)
        return
    dense, _ = run("torch_sdpa", 1, options)
    for backend in options.backend or BACKENDS:
        print(f"{backend}, {options.steps} steps, {'ring' if options.ring else 'Ulysses'}")
        first = None
        for processes in options.processes or (1, 2, 4):
            frames, ranks = run(backend, processes, options)
            first = frames if first is None else first
            print("\n".join(lines(processes, pooled_psnr(frames, first), pooled_psnr(frames, dense), ranks)), flush=True)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", help="1, 2 and 4 unless given; 2, 4 and 8 where pairs are counted")
    parser.add_argument("--backend", action="append", help=f"one or more, in place of {' and '.join(BACKENDS)}")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompt", default=PROMPT, help="a caption that the demo model knows; unless given: %(default)s")
    parser.add_argument("--num-frames", type=int, default=DEFAULTS["num_frames"], help="the model is made for %(default)s")
    parser.add_argument("--count-pairs", action="store_true", help="count what each rank of a ring would compute, in place of a run")
    parser.add_argument("--ring", action="store_true", help="split queries, not heads")
    parser.add_argument("--rank-writes-to", type=Path, help=argparse.SUPPRESS)
    return parser


def run(backend: str, processes: int, options: argparse.Namespace) -> tuple[np.ndarray[Any, Any], list[dict[str, Any]]]:
    """The frames, and what every rank reports."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--backend", backend, "--sparsity", str(options.sparsity), "--steps", str(options.steps)]
        arguments += ["--num-frames", str(options.num_frames), "--prompt", options.prompt, "--rank-writes-to", folder]
        start_ranks(processes, arguments + ["--ring"] * options.ring)
        return np.load(Path(folder) / "frames.npy"), json.loads((Path(folder) / "ranks.json").read_text(encoding="utf-8"))


def start_ranks(processes: int, arguments: Sequence[str]) -> None:
    """Run this module with the arguments as so many ranks; returns when they have ended.

    Raises:
        CalledProcessError: one of them failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "benchmarks.parallel"]
    environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1)), "OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run([*command, *arguments], env={**os.environ, **environment}, check=True)


def _run_rank(options: argparse.Namespace) -> None:
    dist.init_process_group()
    rank, count = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.accelerator.device_count() >= count:
        torch.accelerator.set_device_index(rank)
        device = torch.device(str(torch.accelerator.current_accelerator()), rank)
    pipe = load_pipeline(str(find_demo_model().path), dtype=torch.float32, device=device)
    pipe.set_progress_bar_config(disable=True)
    if count > 1:
        split_denoisers(pipe, **{"ring_degree" if options.ring else "ulysses_degree": count})
    backend = options.backend[0]
    arguments = {key: DEFAULTS[key] for key in ("height", "width", "guidance_scale")}
    arguments |= {"num_frames": options.num_frames, "num_inference_steps": options.steps, "prompt": options.prompt}
    with ExitStack() as stack:
        # the clip is short for real devices
        config = {} if backend == "torch_sdpa" else {"sparsity": options.sparsity, "min_tokens": 0}
        handle = stack.enter_context(ditattn.install(pipe, backend, **config))
        frames, times = call_pipeline(pipe, arguments, seed=0)
    report = handle.report().components["transformer"]
    of_tensor = bytes_of_tensor(pipe.transformer.config, count, options.num_frames)
    dealt = report.sparse if options.ring and backend == "permuted_sparse_attn" else 0
    own = {
        "denoise_ms": times.stages["denoise"],
        "attention_ms": report.attention_ms,
        "communication_ms": report.communication_ms,
        "density": report.sparse_density,
        "own_blocks": report.own_blocks,
        "bytes": report.calls * bytes_per_call(of_tensor, count, ring=options.ring) + dealt * bytes_of_deal(of_tensor, count),
    }
    ranks: list[Any] = [None] * count
    dist.all_gather_object(ranks, own)
    if rank == 0:
        np.save(options.rank_writes_to / "frames.npy", frames)
        (options.rank_writes_to / "ranks.json").write_text(json.dumps(ranks), encoding="utf-8")
    dist.destroy_process_group()


def bytes_of_tensor(config: Any, count: int, num_frames: int) -> int:
    """A rank's part of the queries of one attention call of the demo model, fp32."""
    tokens = num_frames * (DEFAULTS["height"] // 4) * (DEFAULTS["width"] // 4)
    return tokens // count * config.num_attention_heads * int(config.attention_head_dim) * 4


def bytes_per_call(of_tensor: int, count: int, *, ring: bool) -> int:
    """What a rank sends in one attention call: its part of four tensors, or its keys and values to all others."""
    return 2 * of_tensor * (count - 1) if ring else 4 * of_tensor * (count - 1) // count


def bytes_of_deal(of_tensor: int, count: int) -> int:
    """What a rank of a ring sends beside, where blocks of queries are dealt out: its part of its queries, and of results."""
    return 2 * of_tensor * (count - 1) // count


def lines(processes: int, psnr: float, psnr_of_dense: float, ranks: list[dict[str, Any]]) -> list[str]:
    """For people: a line for the clip, and one for every rank."""
    attention = [rank["attention_ms"] for rank in ranks]
    balance = max(attention) / (sum(attention) / len(attention))
    clip = f"  {processes} processes: PSNR {psnr:.1f} dB against one, {psnr_of_dense:.1f} dB against dense"
    found = [f"{clip}; slowest rank's attention {balance:.2f} x the mean"]
    for number, rank in enumerate(ranks):
        density = "dense" if rank["density"] is None else f"density {rank['density']:.3f}"
        found.append(
            f"    rank {number}: denoising {rank['denoise_ms'] / 1e3:7.2f} s, attention {rank['attention_ms'] / 1e3:7.2f} s, "
            f"exchanges and waiting {rank['communication_ms'] / 1e3:6.2f} s, {rank['bytes'] / 2**20:7.1f} MiB sent, {density}"
        )
    return found


if __name__ == "__main__":
    main()
