"""Peak memory of one sparse attention call on the CPU, order and selection included.

    python -m benchmarks.sparse_memory --backend rain_fusion_attn

Linux only. Prints one JSON line. The peak is the high-water mark of the process's resident memory during the call, above what stood before
it, plus q, k and v themselves; it is given as a multiple of q + k + v + out. A first small call loads code and starts threads.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ditattn.backends.base import AttentionBackend, CallRecord
from ditattn.backends.selector import get_attn_backend

# Wan 2.1 1.3B, 480p, 81 frames
SHAPE = "wan2.1-1.3b-480p-81f"
GRID, HEADS, HEAD_DIM = (21, 30, 52), 12, 128
SMALL_GRID = (3, 16, 16)


def peak_bytes() -> int:
    """High-water mark of the resident memory of this process (Linux)."""
    # not getrusage: on Linux its mark outlives exec, so a process that a larger one starts begins with that one's mark
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def resident_bytes() -> int:
    """Resident memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def draw(grid: tuple[int, int, int], heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v `[1, S, H, 128]`."""
    shape = (1, grid[0] * grid[1] * grid[2], heads, HEAD_DIM)
    # drawn in place: a temporary in fp32 would raise the high-water mark before the call
    return [torch.empty(shape, dtype=dtype).normal_(generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def call(backend: type[AttentionBackend], tensors: list[Tensor], grid: tuple[int, int, int], sparsity: float) -> tuple[Tensor, CallRecord]:
    """One forward past the dense steps."""
    records: list[CallRecord] = []
    impl = backend.get_impl_cls()(tensors[0].shape[2], HEAD_DIM, observer=records.append)
    metadata = backend.get_builder_cls()().build(
        current_timestep=0, skip_first_steps=0, raw_latent_shape=(1, 16, *grid), patch_size=1, sparsity=sparsity
    )
    return impl.forward(*tensors, metadata), records[0]


def measure(name: str, dtype: torch.dtype, sparsity: float, heads: int = HEADS) -> dict[str, object]:
    """The row that is printed."""
    backend = get_attn_backend(HEAD_DIM, dtype, pipeline_backend=name)
    call(backend, draw(SMALL_GRID, heads, dtype), SMALL_GRID, sparsity)
    tensors = draw(GRID, heads, dtype)
    before = resident_bytes()
    if peak_bytes() > before + 2**26:
        raise RuntimeError("the high-water mark lies above the start: measure in a fresh process")
    out, record = call(backend, tensors, GRID, sparsity)
    size = sum(x.numel() * x.element_size() for x in (*tensors, out))
    inputs = size - out.numel() * out.element_size()
    assert record.plan is not None
    return {
        "backend": name,
        "shape": SHAPE,
        "heads": heads,
        "dtype": str(dtype).removeprefix("torch."),
        "sparsity": sparsity,
        "density": round(record.plan.density(), 4),
        "qkv_out_bytes": size,
        "peak_bytes": peak_bytes() - before + inputs,
        "peak_over_qkv_out": round((peak_bytes() - before + inputs) / size, 3),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="rain_fusion_attn")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument(
        "--heads", type=int, default=HEADS, help="fewer than the model's take less time; what is kept for all heads weighs more"
    )
    arguments = parser.parse_args(given)
    print(json.dumps(measure(arguments.backend, getattr(torch, arguments.dtype), arguments.sparsity, arguments.heads)))


if __name__ == "__main__":
    main()
