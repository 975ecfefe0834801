"""Target and references in one sequence, for every sparse backend: each grid is sparse, none is crowded out, text between them is whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import judge
import oracle
from ditattn.backends.base import AttentionBackend, CallRecord
from ditattn.backends.permuted_sparse_attn import PermutedSparseAttentionBackend
from ditattn.backends.sparse import Reason
from ditattn.plan.token_grids import TokenGrid
from sparse_calls import SPARSE_BACKENDS, draw, tail_of
from sparse_calls import call as sparse_call

BLOCK = 128
backends = pytest.mark.parametrize("backend", [*SPARSE_BACKENDS, PermutedSparseAttentionBackend], ids=lambda b: b.name)
Size = tuple[int, int, int]

# (text in front, target, further grids with the text before each, text behind)
SEQUENCES: dict[str, tuple[int, Size, list[tuple[int, Size]], int]] = {
    "one reference of the same size": (7, (1, 32, 40), [(0, (1, 32, 40))], 0),
    "two references of other sizes": (77, (1, 32, 40), [(0, (1, 40, 24)), (0, (1, 30, 52))], 0),
    "layers": (7, (1, 30, 44), [(0, (1, 30, 44))] * 3, 0),
    "text between and behind": (10, (1, 32, 40), [(130, (1, 32, 40)), (9, (1, 24, 40))], 40),
    "a video and a picture": (0, (5, 16, 20), [(0, (1, 32, 40))], 12),
    "a picture and a video": (12, (1, 32, 40), [(0, (5, 16, 20))], 0),
}
sequences = pytest.mark.parametrize("name", SEQUENCES)
some_sequences = pytest.mark.parametrize("name", ["text between and behind", "a picture and a video"])
# for what holds at any size: the oracle's time grows with the square of the tokens
SHORT: dict[str, tuple[int, Size, list[tuple[int, Size]], int]] = {
    "text between and behind, short": (10, (1, 16, 20), [(130, (1, 16, 20)), (9, (1, 12, 20))], 40),
    "a picture and a video, short": (12, (1, 16, 20), [(0, (3, 12, 10))], 0),
}
short_sequences = pytest.mark.parametrize("name", SHORT)


def call(backend: type[AttentionBackend], *args: Any, **fields: Any) -> tuple[Tensor, CallRecord]:
    """A call behind the dense steps of every backend, in a run whose sparse steps are all alike."""
    if backend is PermutedSparseAttentionBackend:
        fields = {"residual": False, **fields}
    return sparse_call(backend, *args, num_steps=50, **fields)


def fields_of(name: str) -> tuple[Size, int, dict[str, Any]]:
    """The target's grid, the length, and the metadata's fields of a sequence."""
    front, target, parts, behind = {**SEQUENCES, **SHORT}[name]
    start = front + target[0] * target[1] * target[2]
    stop, further = start, []
    for text, size in parts:
        further.append(TokenGrid(stop + text, size))
        stop = further[-1].stop
    length = stop + behind
    return target, length, {"num_prefix_tokens": front, "num_suffix_tokens": length - start, "further_grids": tuple(further)}


def owners(name: str) -> Tensor:
    """int64 `[S]` in the model's order: the grid of every token, -1 for text."""
    target, length, fields = fields_of(name)
    owner = torch.full((length,), -1)
    for number, grid in enumerate((TokenGrid(fields["num_prefix_tokens"], target), *fields["further_grids"])):
        owner[grid.start : grid.stop] = number
    return owner


def blocks_of(record: CallRecord, name: str) -> list[int]:
    """The grid of every block of the recorded order, -1 where it is not of one grid alone."""
    owner = owners(name)
    assert record.order is not None
    forward = record.order.forward
    ordered = owner if forward is None else owner[forward if forward.ndim == 1 else forward[0]]
    parts = [set(ordered[start : start + BLOCK].tolist()) for start in range(0, len(owner), BLOCK)]
    return [part.pop() if len(part) == 1 else -1 for part in parts]


@backends
@sequences
def test_density_is_near_what_was_asked(backend: type[AttentionBackend], name: str) -> None:
    target, length, fields = fields_of(name)
    q, k, v = (draw(1, length, 1, 32, seed=i) for i in range(3))
    _, record = call(backend, q, k, v, target, sparsity=0.75, first_frame_sink=False, **fields)
    assert record.reason is None
    assert record.plan.density() < 0.5
    _, whole = call(backend, q, k, v, target, sparsity=0.75, first_frame_sink=False, **{**fields, "further_grids": ()})
    assert whole.plan.density() > record.plan.density() + 0.2, "nothing is saved where references are kept whole"


@backends
@some_sequences
def test_every_grid_has_its_share_of_every_row(backend: type[AttentionBackend], name: str) -> None:
    """Rows keep blocks of every grid, or in `permuted_sparse_attn` the rows of every grid have the same budget."""
    target, length, fields = fields_of(name)
    q, k, v = (draw(1, length, 1, 32, seed=i) for i in range(3))
    # keys of the target score higher than all others
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, owners(name) == 0, :, 0] = 4.0
    _, record = call(backend, q, k, v, target, sparsity=0.75, first_frame_sink=False, **fields)
    mask, blocks = record.plan.to_mask().float(), torch.tensor(blocks_of(record, name))
    text = blocks == -1
    assert bool((mask[..., text] == 1).all() and (mask[..., text, :] == 1).all())
    grids = [grid for grid in range(len(fields["further_grids"]) + 1) if bool((blocks == grid).any())]
    assert len(grids) == len(fields["further_grids"]) + 1
    for grid in grids:
        own = blocks == grid
        if backend is PermutedSparseAttentionBackend:
            share = mask[..., own, :].mean()
            assert 0.23 < float(share) < 0.33
        else:
            kept = mask[..., ~text, :][..., own].mean(-1)
            assert float(kept.min()) > 0
            assert float(kept.mean()) < 0.45


@backends
@short_sequences
def test_output_is_exact_attention_over_the_recorded_plan(backend: type[AttentionBackend], name: str) -> None:
    target, length, fields = fields_of(name)
    q, k, v = (draw(1, length, heads, 32, seed=i) for i, heads in enumerate((2, 1, 1)))
    out, record = call(backend, q, k, v, target, sparsity=0.75, **fields)
    order, plan = record.order, record.plan
    tail = tail_of(q, k, v, order) if backend is PermutedSparseAttentionBackend else None
    exact = order.undo(oracle.attention(order.apply(q), order.apply(k), order.apply(v), plan=plan, tail=tail)[0])
    assert judge.relative_error(out, exact) < 4e-6


@backends
@short_sequences
def test_keeping_everything_equals_dense(backend: type[AttentionBackend], name: str) -> None:
    target, length, fields = fields_of(name)
    q, k, v = (draw(1, length, 1, 32, seed=i) for i in range(3))
    nothing = {"threshold": 1 - 1e-7, "sparsity": 0.0} if backend.name == "block_sparse_attn" else {"sparsity": 1e-5}
    out, record = call(backend, q, k, v, target, **nothing, **fields)
    assert record.plan.density() == pytest.approx(1.0)
    assert judge.relative_error(out, oracle.attention(q, k, v)[0]) < 2e-6


@backends
@pytest.mark.parametrize("sink", [True, False])
def test_every_video_has_a_first_frame_of_its_own(backend: type[AttentionBackend], sink: bool) -> None:
    """Two videos and a picture, frames of two blocks each: the first frames of the videos are kept, the picture is not."""
    fields = {"num_suffix_tokens": 8 * 256 + 2048, "further_grids": (TokenGrid(2048, (1, 32, 64)), TokenGrid(4096, (8, 16, 16)))}
    q, k, v = (draw(1, 3 * 2048, 1, 32, seed=i) for i in range(3))
    ends = {"keep_sink": False, "keep_recent": False} if backend.name == "block_sparse_attn" else {}
    _, record = call(backend, q, k, v, (8, 16, 16), sparsity=0.9, first_frame_sink=sink, **ends, **fields)
    columns = record.plan.to_mask().all(-2)[0, 0].nonzero().flatten().tolist()
    assert columns == ([0, 1, 32, 33] if sink else [])


@backends
@some_sequences
def test_a_planted_object_in_the_last_reference_is_kept(backend: type[AttentionBackend], name: str) -> None:
    """One place of the target and one of the last grid share a feature that nothing else has: the sparse result there is the dense one."""
    target, length, fields = fields_of(name)
    front, last = fields["num_prefix_tokens"], fields["further_grids"][-1]
    q, k, v = (0.1 * draw(1, length, 1, 32, seed=i) for i in range(3))
    looking = front + torch.arange(16) + target[2] * 9
    # within one block of the raster order, of which the smallest grid keeps a single one
    shown = -(-last.start // BLOCK) * BLOCK + BLOCK + torch.arange(16)
    q[:, looking, :, 0] = 40.0
    k[:, shown, :, 0] = 40.0
    v[:, shown] += 3.0
    out, record = call(backend, q, k, v, target, sparsity=0.75, first_frame_sink=False, **fields)
    assert record.plan.density() < 0.5
    dense = oracle.attention(q[:, looking], k, v)[0]
    assert float(dense.mean()) > 2.5
    assert judge.relative_error(out[:, looking], dense) < 1e-3


@backends
@pytest.mark.parametrize("sizes", [[(1, 1, 1), (1, 3, 5)], [(1, 10, 10)] * 3, [(1, 32, 40), (1, 3, 4)], [(3, 5, 7), (2, 13, 29)]])
def test_any_grids_run(backend: type[AttentionBackend], sizes: list[Size]) -> None:
    grids, start = [], 3
    for size in sizes:
        grids.append(TokenGrid(start, size))
        start = grids[-1].stop
    q, k, v = (draw(2, start, 1, 32, seed=i) for i in range(3))
    fields = {"num_prefix_tokens": 3, "num_suffix_tokens": start - grids[0].stop, "further_grids": tuple(grids[1:])}
    out, record = call(backend, q, k, v, sizes[0], sparsity=0.75, **fields)
    assert record.reason is None
    order, plan = record.order, record.plan
    tail = tail_of(q, k, v, order) if backend is PermutedSparseAttentionBackend else None
    exact = order.undo(oracle.attention(order.apply(q), order.apply(k), order.apply(v), plan=plan, tail=tail)[0])
    assert judge.relative_error(out, exact) < 4e-6


@backends
def test_padding_behind_the_last_grid_is_hidden_and_in_a_grid_it_is_refused(backend: type[AttentionBackend]) -> None:
    target, length, fields = fields_of("text between and behind, short")
    q, k, v = (draw(1, length, 1, 32, seed=i) for i in range(3))
    k[:, -30:], v[:, -30:] = 1e4, 1e4
    lengths = {"key_lengths": torch.tensor([length - 30]), "known_key_lengths": (length - 30,)}
    nothing = {"threshold": 1 - 1e-7, "sparsity": 0.0} if backend.name == "block_sparse_attn" else {"sparsity": 1e-5}
    out, record = call(backend, q, k, v, target, **nothing, **fields, **lengths)
    assert record.reason is None
    dense = oracle.attention(q[:, :-30], k[:, :-30], v[:, :-30])[0]
    assert judge.relative_error(out[:, :-30], dense) < 2e-6
    short = {"key_lengths": torch.tensor([length - 41]), "known_key_lengths": (length - 41,)}
    _, record = call(backend, q, k, v, target, sparsity=0.75, **fields, **short)
    assert record.reason == (None if backend.name == "block_sparse_attn" else Reason.PADDED_VIDEO)


def test_a_rule_of_its_own_for_every_part_leaves_one_part_as_it_was() -> None:
    from ditattn.backends.selection import antidiagonal

    q, k = (draw(1, 1536, 2, 32, seed=i) for i in range(2))
    settings: dict[str, Any] = {"scale": 0.2, "protected": torch.zeros(12, dtype=torch.bool), "keep_sink": False, "keep_recent": False}
    one = antidiagonal.select(q, k, sparsity=0.75, **settings)
    assert torch.equal(one.indices, antidiagonal.select(q, k, sparsity=0.75, parts=((0, 12),), **settings).indices)
    parted = antidiagonal.select(q, k, sparsity=0.75, parts=((0, 4), (4, 12)), **settings).to_mask()
    assert bool((parted[..., :4].sum(-1) == 1).all() and (parted[..., 4:].sum(-1) == 2).all())
    nucleus = antidiagonal.select(q, k, sparsity=0.0, threshold=0.5, parts=((0, 4), (4, 12)), **settings).to_mask()
    assert bool((nucleus[..., :4].sum(-1) >= 1).all() and (nucleus[..., 4:].sum(-1) >= 1).all())
    causal = antidiagonal.select(q, k, sparsity=0.75, causal=True, parts=((0, 4), (4, 12)), **settings).to_mask()
    assert not bool(causal.triu(1).any())
    assert bool(causal.any(-1).all())
