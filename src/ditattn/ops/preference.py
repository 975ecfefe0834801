"""Which of two exact implementations is faster on this machine, found out by timing both once.

The order of a table is a guess about machines its authors have not seen. A row may name a `preference`: a function that says for a call
why the row stands back although it could serve it. Here it is a measurement: both implementations run a small call of the same kind
(dtype, head size, options) a few times in turns, and the fastest run of each decides, because a busy machine only ever adds time. One
kind is measured once per process, takes some ten milliseconds, and is kept with its numbers, so that `explain` can show it; a call that
names its implementation measures nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ditattn.ops.calls import DenseCall
from ditattn.ops.table import CallFacts, Implementation, load

__all__ = ["Measurement", "dense_on_cpu", "measurements"]

# A rival must win clearly: near a tie the choice, and with it the last bits of the result, must not change from run to run.
CLEARLY_FASTER = 1.25
ROUNDS = 7
TOKENS = 1024


@dataclass(frozen=True)
class Measurement:
    """Fastest runs in milliseconds of one kind of call; `preferred` is the name of the implementation that serves it."""

    kind: str
    own: str
    own_ms: float
    rival: str
    rival_ms: float
    preferred: str

    def sentence(self) -> str:
        return f"measured here for {self.kind}: {self.own} {self.own_ms:.2f} ms, {self.rival} {self.rival_ms:.2f} ms, so {self.preferred}"


_MEASURED: dict[CallFacts, Measurement] = {}
_LOCK = threading.Lock()


def _new_lock() -> None:
    """A child forked while another thread measures would wait for that thread, which it does not have."""
    global _LOCK
    _LOCK = threading.Lock()


# systems without fork do not have it
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def measurements() -> list[Measurement]:
    """What was measured in this process, in order."""
    return list(_MEASURED.values())


def dense_on_cpu(facts: CallFacts) -> Measurement:
    """The compiled dense kernel against torch's SDPA on the CPU."""
    with _LOCK:
        if facts not in _MEASURED:
            _MEASURED[facts] = _in_own_thread(lambda: _measure_dense(facts))
    return _MEASURED[facts]


def _measure_dense(facts: CallFacts) -> Measurement:
    from ditattn.ops.dense_attention import TABLE

    own, rival = _row(TABLE, "cpu"), _row(TABLE, "torch")
    own_run, rival_run = load(own), load(rival)
    call = _dense_call(facts)
    own_ms, rival_ms = fastest_ms(lambda: own_run(call), lambda: rival_run(call))
    preferred = rival.name if own_ms > CLEARLY_FASTER * rival_ms else own.name
    return Measurement(facts.sentence(), own.name, own_ms, rival.name, rival_ms, preferred)


def _dense_call(facts: CallFacts) -> DenseCall:
    generator = torch.Generator().manual_seed(0)
    num_keys = TOKENS * 3 // 4 if "unequal_lengths" in facts.needs else TOKENS
    key_heads = 2 if "gqa" in facts.needs else 4
    shapes = ((1, TOKENS, 4), (1, num_keys, key_heads), (1, num_keys, key_heads))
    query, key, value = (torch.randn(*shape, facts.head_dim, generator=generator).to(facts.dtype) for shape in shapes)
    lengths = torch.tensor([num_keys - 1]) if "key_lengths" in facts.needs else None
    return DenseCall(query, key, value, 0.1, "causal" in facts.needs, lengths)


def fastest_ms(*calls: Callable[[], object]) -> list[float]:
    """Shortest wall time of each call in milliseconds; they run in turns."""
    fastest = [float("inf")] * len(calls)
    for _ in range(ROUNDS):
        for number, call in enumerate(calls):
            start = time.perf_counter()
            call()
            fastest[number] = min(fastest[number], 1000 * (time.perf_counter() - start))
    return fastest


def _row(table: tuple[Implementation, ...], name: str) -> Implementation:
    return next(row for row in table if row.name == name and row.runs_on("cpu"))


def _in_own_thread(work: Callable[[], Measurement]) -> Measurement:
    """Away from whatever mode the caller is in: under fake tensors, or while a graph is traced, nothing could be timed."""
    results: list[Measurement] = []
    threads = torch.get_num_threads()

    def body() -> None:
        # OpenMP counts threads per thread
        torch.set_num_threads(threads)
        with torch.inference_mode():
            results.append(work())

    thread = threading.Thread(target=body, name="ditattn-self-measurement")
    thread.start()
    thread.join()
    if not results:
        raise RuntimeError("the self-measurement of the CPU kernels failed; its error was printed by its thread")
    return results[0]
