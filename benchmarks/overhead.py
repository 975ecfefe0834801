"""What serving an attention call costs beside its kernel: small calls of a tiny Wan transformer on the CPU, one thread, fp32.

    python -m benchmarks.overhead

Dense: the same call through diffusers' native dispatcher and through `ditattn.install` with torch_sdpa, in turns; both end in torch's SDPA.
Sparse: a call through `ditattn.install` with rain_fusion_attn, less the compiled kernel and less the selection of blocks, each timed inside
that very call. Times are medians of the rounds, differences are taken within a round. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import ditattn
from ditattn.backends.rain_fusion_attn import RainFusionAttentionImpl
from ditattn.ops import cpu_library

HEADS, HEAD_DIM = 2, 64
# token grids (F, Y, X): S 16 and S 1024
GRIDS = ((1, 4, 4), (4, 16, 16))
ROUNDS = 400
SPARSE = {"sparsity": 0.5, "skip_first_steps": 0, "min_tokens": 0}


@dataclass
class Row:
    """One kind of call: microseconds of every round by what they were spent on, and what the others are compared with."""

    title: str
    base: str
    rounds_us: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **spent_us: float) -> None:
        """One round."""
        for what, value in spent_us.items():
            self.rounds_us.setdefault(what, []).append(value)

    def medians_us(self) -> dict[str, float]:
        return {what: statistics.median(values) for what, values in self.rounds_us.items()}

    def lines(self) -> list[str]:
        """For people: each median with its ratio to the base's."""
        medians = self.medians_us()
        return [self.title, *(f"  {what:28} {value:10.1f} us   {value / medians[self.base]:6.2f} x" for what, value in medians.items())]


def measure_dense(grid: tuple[int, int, int], rounds: int) -> Row:
    """Through diffusers' own dispatcher, through an installation, and the difference."""
    row = Row(f"dense, S {tokens(grid)}", "native")

    def inside(attend: Callable[..., Tensor], attend_native: Callable[..., Tensor], tensors: list[Tensor]) -> None:
        for _ in range(rounds + 1):
            native, served = timed_us(attend_native, *tensors), timed_us(attend, *tensors)
            row.add(native=native, installed=served, difference=served - native)

    run_inside(grid, inside, "torch_sdpa")
    return without_first(row)


def measure_sparse(grid: tuple[int, int, int], rounds: int) -> Row:
    """A sparse call: the whole, its kernel, its selection of blocks, and the rest; diffusers' own dense call beside it."""
    row = Row(f"sparse, S {tokens(grid)}", "native")

    def inside(attend: Callable[..., Tensor], attend_native: Callable[..., Tensor], tensors: list[Tensor]) -> None:
        library = cpu_library.selection().library
        assert library is not None
        with recorded(library.functions, "ditattn_attention") as kernel, recorded(RainFusionAttentionImpl, "plan") as selection:
            for _ in range(rounds + 1):
                native = timed_us(attend_native, *tensors)
                kernel.clear()
                selection.clear()
                whole = timed_us(attend, *tensors)
                # both are empty, and this fails, if the call did not run sparse
                row.add(native=native, whole=whole, kernel=kernel[0], selection=selection[0], rest=whole - kernel[0] - selection[0])

    run_inside(grid, inside, "rain_fusion_attn", **SPARSE)
    return without_first(row)


def without_first(row: Row) -> Row:
    """The first round chooses, allocates and caches."""
    return Row(row.title, row.base, {what: values[1:] for what, values in row.rounds_us.items()})


def tokens(grid: tuple[int, int, int]) -> int:
    return grid[0] * grid[1] * grid[2]


def run_inside(grid: tuple[int, int, int], measure: Callable[..., None], backend: str, **config: Any) -> None:
    """Call `measure` where the first self-attention of a served forward begins, so that step, layer and tokens are known.

    It is given the call through the installation, the call through diffusers' native back end, and q, k, v `[1, S, 2, 64]`.
    """
    from diffusers import WanTransformer3DModel
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
    )
    tensors = [torch.randn(1, tokens(grid), HEADS, HEAD_DIM) for _ in range(3)]
    frames, rows, columns = grid
    inputs = {
        "hidden_states": torch.randn(1, 4, frames, 2 * rows, 2 * columns),
        "timestep": torch.tensor([900]),
        "encoder_hidden_states": torch.randn(1, 4, 8),
    }
    with ditattn.install(model, backend, **config), torch.no_grad():
        attention = model.blocks[0].attn1
        ours = attention.processor._attention_backend

        def begin(*_: Any) -> None:
            measure(
                lambda q, k, v: dispatch_attention_fn(q, k, v, backend=ours),
                lambda q, k, v: dispatch_attention_fn(q, k, v, backend=AttentionBackendName.NATIVE),
                tensors,
            )

        attention.register_forward_pre_hook(begin)
        model(**inputs)


def timed_us(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter_ns()
    call(*arguments)
    return (time.perf_counter_ns() - start) / 1e3


@contextlib.contextmanager
def recorded(owner: Any, name: str) -> Iterator[list[float]]:
    """The microseconds of every call of `owner.name`, as they end."""
    function, spent_us = getattr(owner, name), []

    def recording(*arguments: Any) -> Any:
        start = time.perf_counter_ns()
        result = function(*arguments)
        spent_us.append((time.perf_counter_ns() - start) / 1e3)
        return result

    setattr(owner, name, recording)
    try:
        yield spent_us
    finally:
        setattr(owner, name, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"H {HEADS}, D {HEAD_DIM}, float32, one thread; medians of {rounds} rounds; ratios to diffusers' native dispatcher")
    for grid in GRIDS:
        print(*measure_dense(grid, rounds).lines(), sep="\n")
    if reason := cpu_library.problem():
        print(f"sparse: left out, there is no compiled kernel: {reason}")
        return
    # the smaller grid is a single block, which no sparsity drops
    print(*measure_sparse(GRIDS[-1], rounds).lines(), sep="\n")


if __name__ == "__main__":
    main()
