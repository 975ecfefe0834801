"""How many query-key pairs each rank of a ring computes for a video, by counting: no kernel runs, and tokens are random.

Called by `python -m benchmarks.parallel --count-pairs`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ditattn.backends.base import CallRecord
from ditattn.backends.registry import load_backend
from ditattn.plan.split import GatheredRows, GatheredTokens
from ditattn.plan.token_grids import TokenGrid
from ditattn.runtime.metadata import with_dealt_rows

__all__ = ["CONDITIONED", "VIDEO", "kept_pairs", "over_mean", "print_balance"]

Size = tuple[int, int, int]

# 81 frames of 832 x 480 pixels in Wan 2.1: 32760 tokens
VIDEO: tuple[Size, ...] = ((21, 30, 52),)
# 161 frames of 1216 x 704 pixels in LTX-Video behind two conditions, 17 frames and one: 20900 tokens
CONDITIONED: tuple[Size, ...] = ((3, 22, 38), (1, 22, 38), (21, 22, 38))
HEAD_SIZE = 32


def kept_pairs(backend: str, grids: Sequence[Size], ranks: int, sparsity: float, *, deals: bool) -> list[int]:
    """Kept pairs of one head, by rank, for a sequence of grids of which the last is generated.

    `deals`: after whole rows of the first frame were dealt out, or whole blocks, where the backend does so.
    """
    *further, grid = grids
    starts = list(itertools.accumulate(map(math.prod, grids), initial=0))
    length = starts[-1]
    beside = tuple(TokenGrid(start, size) for start, size in zip(starts, further, strict=False))
    cls: Any = load_backend(backend)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, length, 1, HEAD_SIZE, generator=generator) for _ in range(2))
    found = []
    for rank in range(ranks):
        share = GatheredRows(GatheredTokens((length,), ranks), rank, 1, exchange=_random_rows if deals else None)
        metadata = cls.get_builder_cls()().build(
            current_timestep=0,
            raw_latent_shape=(1, 1, *grid),
            patch_size=1,
            sparsity=sparsity,
            skip_first_steps=0,
            num_prefix_tokens=starts[len(further)],
            further_grids=beside,
            rows=share,
        )
        if deals:
            metadata = with_dealt_rows(metadata, cls.get_impl_cls().keeps_first_frame_rows, "cpu") or metadata
        found.append(_pairs(cls, query[:, metadata.rows.tokens()], key, metadata))
    return found


def _random_rows(x: Tensor, _to_each: list[int], from_each: list[int]) -> Tensor:
    """In place of those that other ranks would send."""
    return torch.randn(x.shape[0], sum(from_each), *x.shape[2:])


def _pairs(cls: Any, query: Tensor, key: Tensor, metadata: Any) -> int:
    class Counted(cls.get_impl_cls()):  # type: ignore[misc]
        def _sparse(self, query: Tensor, *_: Any) -> Tensor:
            return query

    records: list[CallRecord] = []
    impl = Counted(1, HEAD_SIZE, observer=records.append)
    impl.forward(query, key, key, metadata)
    (record,) = records
    assert record.plan is not None
    return round(record.plan.density() * record.plan.query_length * key.shape[1])


def print_balance(backends: Sequence[str], ranks: Sequence[int], sparsity: float) -> None:
    """A line for each backend and number of ranks: the slowest rank against the mean, and every rank."""
    for grids in (VIDEO, CONDITIONED):
        names = " and ".join(" x ".join(map(str, size)) for size in grids)
        print(f"ring, {names} tokens, sparsity {sparsity}: kept query-key pairs of each rank over their mean")
        for backend in backends:
            for count in ranks:
                own, dealt = (kept_pairs(backend, grids, count, sparsity, deals=deals) for deals in (False, True))
                print(f"  {backend}, {count} ranks: {over_mean(dealt)}", flush=True)
                if own != dealt:
                    print(f"    without a deal: {over_mean(own)}", flush=True)


def over_mean(pairs: Sequence[int]) -> str:
    """For people."""
    mean = sum(pairs) / len(pairs)
    shares = " ".join(f"{one / mean:.2f}" for one in pairs)
    return f"slowest {max(pairs) / mean:.2f}: {shares}"
