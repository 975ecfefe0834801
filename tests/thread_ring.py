"""The ranks of a ring as threads of one process, which exchange rows without a group."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ditattn.plan.split import GatheredRows, GatheredTokens

T = TypeVar("T")
# it only ends a hang
PATIENCE_S = 300


def in_threads(ranks: int, gathered: GatheredTokens, run: Callable[[GatheredRows], T]) -> list[T]:
    """`run` for every place of a ring; results by place."""
    meeting, sent = threading.Barrier(ranks, timeout=PATIENCE_S), [[torch.empty(0)] * ranks for _ in range(ranks)]

    def exchange(place: int, x: Tensor, to_each: list[int], from_each: list[int]) -> Tensor:
        meeting.wait()
        sent[place] = list(x.split(to_each, dim=1))
        meeting.wait()
        came = [parts[place] for parts in sent]
        assert [part.shape[1] for part in came] == from_each
        meeting.wait()
        return torch.cat(came, dim=1)

    def run_at(place: int) -> T:
        try:
            parts = gathered.ranks // ranks
            return run(GatheredRows(gathered, place * parts, parts, exchange=partial(exchange, place)))
        except Exception:
            # the others would wait
            meeting.abort()
            raise

    with ThreadPoolExecutor(ranks) as threads:
        started = [threads.submit(run_at, place) for place in range(ranks)]
    errors = [error for future in started if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        # what the others say is that this one did not come
        raise error
    return [future.result() for future in started]
