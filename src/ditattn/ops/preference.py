"""Which of two exact implementations is faster on this machine, found out by timing both once.

The order of a table is a guess about machines its authors have not seen: where torch uses the matrix units better, its SDPA is faster than
the compiled kernel. A row may name a `preference`, which measures: both implementations run a small call of the same kind (dtype, head
size, options) a few times in turns, and the fastest run of each decides, because a busy machine only ever adds time. One kind is measured
once per process, takes some ten milliseconds, and is kept with its numbers, so that `explain` can show it; a call that names its
implementation measures nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from ditattn.ops import amx_schedule
from ditattn.ops.calls import DenseCall
from ditattn.ops.dense_attention import cpu, pure_torch
from ditattn.ops.self_measurement import fastest_ms, measured_once
from ditattn.ops.table import CallFacts, kernel_head_dim

__all__ = ["Measurement", "dense_on_cpu"]

# torch must win clearly: near a tie the choice, and with it the last bits of the result, must not change from run to run
CLEARLY_FASTER = 1.25
ROUNDS = 7
TOKENS = 1024


@dataclass(frozen=True)
class Measurement:
    """Fastest runs of one kind of call in milliseconds; on a tile unit for bf16 also which schedule of the kernel ran."""

    kind: str
    cpu_ms: float
    torch_ms: float
    schedule: amx_schedule.Measurement | None = None

    @property
    def preferred(self) -> str:
        """The name of the implementation that serves such calls."""
        return "torch" if self.cpu_ms > CLEARLY_FASTER * self.torch_ms else "cpu"

    def sentence(self) -> str:
        schedule = "" if self.schedule is None else f"; {self.schedule.sentence()}"
        return f"measured here for {self.kind}: cpu {self.cpu_ms:.2f} ms, torch {self.torch_ms:.2f} ms, so {self.preferred}{schedule}"


_MEASURED: dict[CallFacts, Measurement] = {}


def dense_on_cpu(facts: CallFacts) -> Measurement:
    """The compiled dense kernel against torch's SDPA on the CPU."""
    return measured_once(_MEASURED, facts, partial(_measure, facts, torch.get_num_threads()))


def _measure(facts: CallFacts, threads: int) -> Measurement:
    # OpenMP counts threads per thread
    torch.set_num_threads(threads)
    call = _call_of(facts)
    cpu_ms, torch_ms = fastest_ms([partial(cpu.run, call), partial(pure_torch.run, call)], ROUNDS)
    schedule = amx_schedule.found(kernel_head_dim(facts.head_dim)) if facts.dtype == torch.bfloat16 else None
    return Measurement(facts.sentence(), cpu_ms, torch_ms, schedule)


def _call_of(facts: CallFacts) -> DenseCall:
    generator = torch.Generator().manual_seed(0)
    num_keys = TOKENS * 3 // 4 if "unequal_lengths" in facts.needs else TOKENS
    key_heads = 2 if "gqa" in facts.needs else 4
    shapes = ((1, TOKENS, 4), (1, num_keys, key_heads), (1, num_keys, key_heads))
    query, key, value = (torch.randn(*shape, facts.head_dim, generator=generator).to(facts.dtype) for shape in shapes)
    lengths = torch.tensor([num_keys - 1]) if "key_lengths" in facts.needs else None
    return DenseCall(query, key, value, 0.1, "causal" in facts.needs, lengths)
