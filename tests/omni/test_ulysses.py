"""vllm_omni's own Ulysses exchange between two processes, around a layer that ditattn serves."""

from __future__ import annotations

import pytest
import torch

from ditattn.backends.base import CallRecord
from ditattn.backends.registry import BACKENDS, load_backend
from ditattn.models import TokenLayout
from ditattn.runtime.metadata import build_attn_metadata
from ditattn.runtime.step import Step
from omni import ulysses_rank
from ranks import Ranks


@pytest.mark.parametrize("backend", [name for name in BACKENDS if load_backend(name).is_sparse])
def test_a_rank_serves_its_heads_as_if_they_were_all(backend: str) -> None:
    found = load_backend(backend)
    records: list[CallRecord] = []
    config = found.get_config_cls().from_mapping({"min_tokens": 0, "sparsity": 0.75, "skip_first_steps": 0})
    layout = TokenLayout((1, 1, *ulysses_rank.GRID), (1, 1, 1))
    metadata = build_attn_metadata(found.get_builder_cls()(), config, Step(1, None, "none"), layout)
    halves = []
    for heads in (slice(0, 2), slice(2, 4)):
        impl = found.get_impl_cls()(2, ulysses_rank.HEAD_SIZE, layer_index=0, observer=records.append)
        halves.append(impl.forward(*(x[:, :, heads] for x in ulysses_rank.tensors()), metadata))
    assert records[0].plan is not None
    assert records[0].plan.density() < 0.9
    ranks = Ranks(2)
    try:
        answers = ranks.run(ulysses_rank.attend, backend)
    finally:
        ranks.close()
    assert [sparse for _, sparse in answers] == [1, 1]
    torch.testing.assert_close(torch.cat([out for out, _ in answers], dim=1), torch.cat(halves, dim=2), rtol=1e-5, atol=1e-5)
