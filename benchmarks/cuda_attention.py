"""Block-sparse attention on an NVIDIA GPU against FlexAttention and FlashAttention-4 on the same plans and against dense kernels.

    python -m benchmarks.cuda_attention

Prints a table and appends one JSON line per row to benchmarks/results/cuda_attention.jsonl. All arms of a shape take turns in one
process; a row is the median of its rounds. TFLOP/s count the kept query-key pairs of the plan only. The rows of a backend time its whole
call (token order, means, selection, attention, inverse order) and give its peak of extra memory; the row below each times attention alone
on the same plan. Every arm is compared with the reference on a small problem before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda_peers import PEERS, prepare
from ditattn.backends.registry import AttentionBackendEnum, load_backend
from ditattn.bench.cpu_attention import random_plan
from ditattn.devices.clock import Stopwatch
from ditattn.errors import DitattnError
from ditattn.ops.block_sparse_attention import block_sparse_attention
from ditattn.ops.dense_attention import dense_attention
from ditattn.plan.block_plan import BlockPlan, num_blocks, num_kept

RESULTS = Path(__file__).parent / "results" / "cuda_attention.jsonl"
SPARSITIES = (0.5, 0.75, 0.9)
SPARSE_ARMS = ("triton", "flex", *PEERS)
DENSE_ARMS = ("cudnn", "flash")
BACKENDS = ("permuted_sparse_attn", "rain_fusion_attn")
# of the whole run; below the eight minutes that one command may take
BUDGET_S = 420
MAX_RELATIVE_ERROR = 2e-2
# what kernels raise that cannot run, ours and others'
REFUSALS = (DitattnError, RuntimeError, ValueError, TypeError, AssertionError, ImportError)


@dataclass(frozen=True)
class Shape:
    """A model's self-attention: token grid (F, Y, X), tokens of text behind it, heads, head size."""

    name: str
    grid: tuple[int, int, int]
    heads: int
    text: int = 0
    dim: int = 128

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] + self.text


SHAPES = (
    Shape("flux.1-1024px", (1, 64, 64), heads=24, text=512),
    Shape("wan2.1-1.3b-480p-81f", (21, 30, 52), heads=12),
    Shape("wan2.1-14b-720p-81f", (21, 45, 80), heads=40),
    Shape("hunyuanvideo-720p-129f", (33, 45, 80), heads=24, text=256),
)


@dataclass
class Row:
    """One arm on one shape; times in milliseconds."""

    shape: str
    arm: str
    sparsity: float
    density: float
    tokens: int
    heads: int
    dim: int
    samples_ms: list[float] = field(default_factory=list)
    problem: str | None = None
    peak_over_qkv_out: float | None = None

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.samples_ms else None

    @property
    def tflops(self) -> float | None:
        """Rate over the kept pairs: two products of 2 D operations each."""
        if self.median_ms is None:
            return None
        return 4 * self.dim * self.heads * self.tokens**2 * self.density / self.median_ms / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(shape.name for shape in SHAPES), help="names, separated by commas")
    parser.add_argument("--arms", default=",".join((*DENSE_ARMS, *SPARSE_ARMS, *BACKENDS)), help="likewise")
    parser.add_argument("--sparsities", default=",".join(map(str, SPARSITIES)), help="likewise")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="time nothing: what one whole call of every backend is made of")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU here (torch sees no CUDA device): nothing was measured", file=sys.stderr)
        return 1
    machine = describe_machine()
    print(json.dumps(machine))
    deadline_s = time.monotonic() + BUDGET_S
    arms, sparsities = arguments.arms.split(","), [float(one) for one in arguments.sparsities.split(",")]
    if arguments.profile:
        for shape in (shape for shape in SHAPES if shape.name in arguments.shapes.split(",")):
            for backend, sparsity in itertools.product((arm for arm in arms if arm in BACKENDS), sparsities):
                print(profile_call(shape, backend, sparsity, "cuda"))
        return 0
    refused = check_arms("cuda", tuple(arm for arm in arms if arm not in BACKENDS))
    rows = []
    for shape in (shape for shape in SHAPES if shape.name in arguments.shapes.split(",")):
        rows += measure(shape, "cuda", arguments.rounds, deadline_s, refused, arms, sparsities)
        torch.cuda.empty_cache()
    print_table(rows)
    write(rows, machine, arguments.output)
    return 0


def describe_machine() -> dict[str, Any]:
    """What a number needs beside it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "driver": _output(query),
        "commit": _output(["git", "rev-parse", "--short", "HEAD"]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "flash-attn-4": _version("flash-attn-4"),
    }


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def draw(shape: Shape, device: str, seed: int = 0) -> list[Tensor]:
    """q, k, v `[1, S, H, D]` in bf16."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (1, shape.tokens, shape.heads, shape.dim)
    return [torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3)]


def plan_of(shape: Shape, sparsity: float, device: str) -> BlockPlan:
    """As many blocks per row as rain_fusion_attn keeps, at random: the least that neighbouring rows can share."""
    blocks = num_blocks(shape.tokens)
    return random_plan(shape.tokens, shape.heads, num_kept(blocks, sparsity) / blocks, device)


def check_arms(device: str, arms: tuple[str, ...] = (*SPARSE_ARMS, *DENSE_ARMS)) -> dict[str, str]:
    """Arms that cannot run or are wrong on a small problem, with the reason. They are not timed."""
    shape = Shape("check", (1, 25, 40), heads=2)
    q, k, v = draw(shape, device)
    plan = plan_of(shape, 0.5, device)
    refused = {}
    for arm in arms:
        call = _call(arm, q, k, v, plan)
        exact = (
            dense_attention(q.float(), k.float(), v.float(), implementation="reference")
            if arm in DENSE_ARMS
            else block_sparse_attention(q.float(), k.float(), v.float(), plan, implementation="reference")
        )
        try:
            error = ((call().float() - exact).norm() / exact.norm()).item()
        except REFUSALS as problem:
            refused[arm] = _first_line(problem)
            continue
        if not error < MAX_RELATIVE_ERROR:
            refused[arm] = f"wrong: relative error {error:.1e}"
    return refused


def _call(arm: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan | None) -> Callable[[], Tensor]:
    if arm in DENSE_ARMS:
        return partial(dense_attention, q, k, v, implementation=arm)
    assert plan is not None
    if arm in PEERS:
        return prepare(arm, q, k, v, plan)
    return partial(block_sparse_attention, q, k, v, plan, implementation=arm)


def measure(
    shape: Shape,
    device: str,
    rounds: int,
    deadline_s: float,
    refused: dict[str, str],
    arms: Sequence[str] = (*DENSE_ARMS, *SPARSE_ARMS, *BACKENDS),
    sparsities: Sequence[float] = SPARSITIES,
) -> list[Row]:
    """Every arm of one shape; the arms take turns until the rounds or the time are used up."""
    q, k, v = draw(shape, device)
    base = Row(shape.name, "", 0.0, 1.0, shape.tokens, shape.heads, shape.dim)
    work: list[tuple[Row, Callable[[], Tensor]]] = []
    for arm in (arm for arm in arms if arm in DENSE_ARMS):
        work.append((replace(base, arm=arm, samples_ms=[]), _call(arm, q, k, v, None)))
    for sparsity in sparsities:
        plan = plan_of(shape, sparsity, device)
        for arm in (arm for arm in arms if arm not in (*DENSE_ARMS, *BACKENDS)):
            work.append((replace(base, arm=arm, sparsity=sparsity, density=plan.density(), samples_ms=[]), _call(arm, q, k, v, plan)))
        for backend in (arm for arm in arms if arm in BACKENDS):
            work += _whole_call(base, backend, shape, sparsity, q, k, v)
    for row, call in work:
        row.problem = refused.get(row.arm) or _warm_up(row, call, q)
    for _ in range(rounds):
        if time.monotonic() > deadline_s:
            break
        for row, call in work:
            if row.problem is None:
                watch = Stopwatch()
                with watch.measure(q.device):
                    call()
                row.samples_ms.append(watch.total_ms())
    return [row for row, _ in work]


def _whole_call(
    base: Row, backend: str, shape: Shape, sparsity: float, q: Tensor, k: Tensor, v: Tensor
) -> list[tuple[Row, Callable[[], Tensor]]]:
    """The backend past its dense steps, and attention alone on the plan it makes: what lies between is order, means and selection."""
    records: list[Any] = []
    cls = load_backend(AttentionBackendEnum(backend))
    metadata = cls.get_builder_cls()().build(
        current_timestep=0,
        skip_first_steps=0,
        raw_latent_shape=(1, 16, *shape.grid),
        patch_size=1,
        sparsity=sparsity,
        num_suffix_tokens=shape.text,
    )
    layer = cls.get_impl_cls()(shape.heads, shape.dim, observer=records.append)
    # the first call chooses orders, once per run
    layer.forward(q, k, v, metadata)
    plan = records[0].plan
    fields: dict[str, Any] = {"sparsity": sparsity, "density": plan.density()}
    return [
        (replace(base, arm=backend, samples_ms=[], **fields), partial(layer.forward, q, k, v, metadata)),
        (replace(base, arm="- attention alone", samples_ms=[], **fields), partial(block_sparse_attention, q, k, v, plan)),
    ]


def profile_call(shape: Shape, backend: str, sparsity: float, device: str) -> str:
    """How long the host takes to queue a whole call, how long the call takes, and a table of its operations and kernels by their time."""
    base = Row(shape.name, "", 0.0, 1.0, shape.tokens, shape.heads, shape.dim)
    _, call = _whole_call(base, backend, shape, sparsity, *draw(shape, device))[0]
    wait = torch.cuda.synchronize if device == "cuda" else int
    with torch.inference_mode():
        for _ in range(3):
            call()
        wait()
        start_s = time.perf_counter()
        call()
        queued_s = time.perf_counter() - start_s
        wait()
        done_s = time.perf_counter() - start_s
        with torch.profiler.profile() as profiled:
            call()
            wait()
    table = profiled.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=30, max_name_column_width=60)
    return f"{shape.name}, {backend} at {sparsity}: queued in {1e3 * queued_s:.2f} ms, done after {1e3 * done_s:.2f} ms\n{table}"


def _warm_up(row: Row, call: Callable[[], Tensor], q: Tensor) -> str | None:
    """Compile and settle; note the peak of memory over q, k, v and out."""
    try:
        call()
        if q.device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            size = q.numel() * q.element_size()
            row.peak_over_qkv_out = round((torch.cuda.max_memory_allocated() - before - size) / (4 * size), 3)
    except REFUSALS as problem:
        return _first_line(problem)
    return None


def _first_line(problem: Exception) -> str:
    return (str(problem) or type(problem).__name__).splitlines()[0]


def print_table(rows: list[Row]) -> None:
    best: dict[str, float] = {}
    for row in rows:
        if row.arm in DENSE_ARMS and row.median_ms is not None:
            best[row.shape] = min(row.median_ms, best.get(row.shape, row.median_ms))
    print(f"{'shape':24} {'arm':20} {'sparsity':>8} {'density':>8} {'ms':>9} {'spread':>7} {'TFLOP/s':>8} {'vs dense':>8} {'memory':>7}")
    for row in rows:
        head = f"{row.shape:24} {row.arm:20} {row.sparsity:8.2f} {row.density:8.3f}"
        if row.median_ms is None or row.tflops is None:
            print(f"{head} {row.problem or 'no time left'}")
            continue
        spread = (max(row.samples_ms) - min(row.samples_ms)) / row.median_ms
        dense = best.get(row.shape)
        ratio = f"{dense / row.median_ms:7.2f}x" if dense else f"{'-':>8}"
        memory = "-" if row.peak_over_qkv_out is None else f"{row.peak_over_qkv_out:.0%}"
        print(f"{head} {row.median_ms:9.3f} {spread:7.1%} {row.tflops:8.0f} {ratio} {memory:>7}")


def write(rows: list[Row], machine: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**machine, **asdict(row), "median_ms": row.median_ms, "tflops": row.tflops}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
