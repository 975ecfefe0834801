"""Earlier frames, keyframes and references as families read them from a forward's arguments: as sparse as the video, and found there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import judge
import oracle
from ditattn.backends.base import AttentionBackend
from ditattn.backends.permuted_sparse_attn import PermutedSparseAttentionBackend
from ditattn.models.base import TokenLayout
from ditattn.models.helios import HELIOS
from ditattn.models.hunyuan_video_framepack import HUNYUAN_VIDEO_FRAMEPACK
from ditattn.models.ltx2 import LTX2
from ditattn.models.minimax_h3 import MINIMAX_H3
from ditattn.plan.token_order import token_order
from sparse_calls import SPARSE_BACKENDS, draw
from sparse_calls import call as sparse_call

BLOCK = 128
backends = pytest.mark.parametrize("backend", [*SPARSE_BACKENDS, PermutedSparseAttentionBackend], ids=lambda b: b.name)
TIMES = torch.arange(5.0)


def places(*times: float) -> torch.Tensor:
    """Time, row and column of frames of 16 x 20 tokens, `(S, 3)`."""
    return torch.cartesian_prod(torch.tensor(times), torch.arange(16.0), torch.arange(20.0))


def framepack() -> TokenLayout:
    frames = {"latents_clean": 4, "latents_history_2x": 2, "latents_history_4x": 16}
    arguments: dict[str, Any] = {name: torch.empty(1, 4, count, 32, 40) for name, count in frames.items()}
    arguments |= {f"indices_{name}": torch.arange(count) for name, count in frames.items()}
    text = {"image_embeds": torch.empty(1, 6, 8), "encoder_attention_mask": torch.ones(1, 12)}
    config = SimpleNamespace(patch_size=2, patch_size_t=1)
    return HUNYUAN_VIDEO_FRAMEPACK.layout(config, {**arguments, **text, "hidden_states": torch.empty(1, 4, 5, 32, 40)})


def helios() -> TokenLayout:
    frames = {"short": 4, "mid": 2, "long": 16}
    arguments: dict[str, Any] = {f"latents_history_{name}": torch.empty(1, 4, count, 32, 40) for name, count in frames.items()}
    arguments |= {f"indices_latents_history_{name}": torch.arange(count) for name, count in frames.items()}
    return HELIOS.layout(SimpleNamespace(patch_size=(1, 2, 2)), {**arguments, "hidden_states": torch.empty(1, 4, 5, 32, 40)})


def ltx2() -> TokenLayout:
    """A keyframe and a reference of the video's length behind it."""
    starts = torch.cat([places(*TIMES), places(3.0), places(*TIMES)]).T
    coordinates = torch.stack([starts, starts + 1], -1)[None]
    arguments = {"hidden_states": torch.empty(1, starts.shape[1], 8), "num_frames": 5, "height": 16, "width": 20}
    return LTX2.layout(SimpleNamespace(), {**arguments, "video_coords": coordinates})


def minimax_h3() -> TokenLayout:
    """Text, a keyframe, a reference of three frames, audio, the video."""
    parts = [(1, torch.zeros(7, 3)), (0, places(2.0)), (0, places(4.0, 5.0, 6.0)), (2, torch.zeros(30, 3)), (0, places(*(TIMES + 9)))]
    tags = torch.cat([torch.full((len(part),), tag) for tag, part in parts])
    positions = torch.cat([part for _, part in parts])
    return MINIMAX_H3.layout(
        SimpleNamespace(), {"position_ids": positions, "token_tags": tags, "hidden_states": torch.empty(1, len(tags), 8)}
    )


LAYOUTS = {"framepack": framepack, "helios": helios, "ltx 2": ltx2, "minimax h3": minimax_h3}
families = pytest.mark.parametrize("name", LAYOUTS)


def fields(layout: TokenLayout) -> dict[str, Any]:
    """The metadata's fields of a sequence."""
    beside = {"num_prefix_tokens": layout.num_prefix_tokens, "num_suffix_tokens": layout.num_suffix_tokens}
    return {**beside, "further_grids": layout.further_grids, "first_frame_sink": False, "sparsity": 0.75, "num_steps": 50}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("framepack", [(4, 4, 5), (1, 8, 10), (4, 16, 20)]),
        ("helios", [(4, 4, 5), (1, 8, 10), (4, 16, 20)]),
        ("ltx 2", [(1, 16, 20), (5, 16, 20)]),
        ("minimax h3", [(1, 16, 20), (3, 16, 20)]),
    ],
)
def test_they_are_grids(name: str, sizes: list[tuple[int, int, int]]) -> None:
    layout = LAYOUTS[name]()
    assert layout.grid == (5, 16, 20)
    assert [grid.size for grid in layout.further_grids] == sizes


@backends
@families
def test_density_is_near_what_was_asked(backend: type[AttentionBackend], name: str) -> None:
    layout = LAYOUTS[name]()
    q, k, v = (draw(1, layout.num_tokens, 1, 32, seed=i) for i in range(3))
    _, record = sparse_call(backend, q, k, v, layout.grid, **fields(layout))
    assert record.plan is not None
    assert record.plan.density() < 0.55
    _, whole = sparse_call(backend, q, k, v, layout.grid, **{**fields(layout), "further_grids": ()})
    assert whole.plan is not None
    assert whole.plan.density() > record.plan.density() + 0.2, "nothing is saved where they are kept whole"


@backends
@families
def test_a_planted_object_is_found_there(backend: type[AttentionBackend], name: str) -> None:
    """One place of the video and one of the largest reference share a feature that nothing else has."""
    layout = LAYOUTS[name]()
    reference = max(layout.further_grids, key=lambda grid: grid.num_tokens)
    q, k, v = (0.1 * draw(1, layout.num_tokens, 1, 32, seed=i) for i in range(3))
    looking = layout.num_prefix_tokens + torch.arange(16) + layout.grid[2] * 9
    # within one block of the raster order
    shown = -(-reference.start // BLOCK) * BLOCK + BLOCK + torch.arange(16)
    q[:, looking, :, 0] = 40.0
    k[:, shown, :, 0] = 40.0
    v[:, shown] += 3.0
    out, record = sparse_call(backend, q, k, v, layout.grid, **fields(layout))
    assert record.plan is not None
    assert record.plan.density() < 0.55
    dense = oracle.attention(q, k, v)[0]
    assert float(dense[:, looking].mean()) > 2.5
    assert judge.relative_error(out[:, looking], dense[:, looking]) < 1e-3


@families
@pytest.mark.parametrize("order", ["raster", "tile"])
def test_orders_are_undone(name: str, order: str) -> None:
    layout = LAYOUTS[name]()
    made = token_order(order, layout.grid, layout.num_prefix_tokens, layout.num_suffix_tokens, further_grids=layout.further_grids)
    tokens = torch.arange(layout.num_tokens).view(1, -1, 1, 1)
    assert torch.equal(made.undo(made.apply(tokens)), tokens)
    assert made.apply(tokens).flatten().sort().values.tolist() == list(range(layout.num_tokens))
    assert len(made.grids) == 1 + len(layout.further_grids)
