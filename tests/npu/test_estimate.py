"""The estimator's operator behind every package's signature, against our own selection in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditattn.backends.selection import antidiagonal
from ditattn.ops.block_estimate import TABLE, ascend
from ditattn.ops.table import CallFacts

NAMES = [row.name.upper() for row in TABLE]
FACTS = CallFacts("npu", torch.bfloat16, 128, num_keys=32760)


def clustered(length: int, heads: int, dim: int, seed: int) -> Tensor:
    """Tokens near each other resemble each other, so that blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(2, -(-length // 96), heads, dim, generator=generator).repeat_interleave(96, 1)[:, :length]
    return (centres + 0.5 * torch.randn(2, length, heads, dim, generator=generator)).to(torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("dim", "sparsity", "threshold"), [(64, 0.5, 1.0), (32, 0.8, 1.0), (128, 0.95, 1.0), (64, 0.3, 0.9), (96, 0.9, 1.0)]
)
def test_agrees_with_our_selection(name: str, dim: int, sparsity: float, threshold: float) -> None:
    """Up to near-ties: at most 2 % of the entries differ, and the operator, which keeps near-ties, omits fewer than 1 %."""
    length, heads = 1400, 4
    query, key = clustered(length, heads, dim, 1), clustered(length, 2, dim, 2)
    theirs = getattr(ascend, name).run(query, key, 3 * dim**-0.5, sparsity, threshold)
    ours = antidiagonal.select(
        query, key, scale=3 * dim**-0.5, sparsity=sparsity, threshold=threshold, protected=torch.zeros(11, dtype=torch.bool)
    ).to_mask()
    assert theirs.shape == ours.shape
    assert (theirs != ours).float().mean() <= 0.02
    assert (ours & ~theirs).float().mean() < 0.01
    assert 0.1 < ours.float().mean() < 0.9


@pytest.mark.parametrize("columns", [10, 21, 256, 591, 1024])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 0.99, 0.999])
def test_the_share_survives_fp32(columns: int, sparsity: float) -> None:
    """What the operator computes from it is the number of blocks that we ask for; plain 1 - 0.9 of 10 blocks would give none."""
    kept = int(float(torch.tensor(ascend.row_share(columns, sparsity)) * columns))
    assert kept == max(1, int(round(columns * (1 - sparsity), 6)))


def test_used_where_it_takes_the_call_and_only_there(soc: Callable[[str], None]) -> None:
    def taken(facts: CallFacts) -> list[str]:
        return [row.name for row in TABLE if row.refusal(facts) is None]

    soc("Ascend910B2")
    assert taken(FACTS) == [name.lower() for name in NAMES]
    for need in ("causal", "key_lengths", "unequal_lengths", "free_columns", "other_block_size"):
        assert taken(CallFacts("npu", torch.bfloat16, 128, frozenset({need}), num_keys=32760)) == []
    assert "never scores the last 3 of 32763 keys" in (TABLE[0].refusal(CallFacts("npu", torch.bfloat16, 128, num_keys=32763)) or "")
    assert "up to 131072 tokens" in (TABLE[0].refusal(CallFacts("npu", torch.bfloat16, 128, num_keys=131080)) or "")
    soc("Ascend950PR_9579")
    assert taken(FACTS) == []
    assert "this is Ascend950PR_9579 (A5): use torch" in (TABLE[0].refusal(FACTS) or "")


@pytest.mark.parametrize("mistake", ["scale", "not transposed", "columns"])
def test_a_mistake_is_noticed(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ascend.estimate_inputs
    if mistake == "scale":
        monkeypatch.setattr(ascend, "estimate_inputs", lambda *a: original(*a)._replace(scale=original(*a).scale * 8))
    elif mistake == "not transposed":
        monkeypatch.setattr(ascend, "to_heads_first", lambda x, dim: x.reshape(x.shape[0], x.shape[2], x.shape[1], dim).contiguous())
    else:
        monkeypatch.setattr(ascend, "estimate_output", lambda mask, num_keys: mask.bool())
    with pytest.raises((AssertionError, RuntimeError)):
        test_agrees_with_our_selection("ESTIMATE_MINDIESD", 64, 0.5, 1.0)
