"""Every operation is forward only: a backward through it is refused in a sentence, and no gradient is silently missing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ditattn
from ditattn.errors import UnsupportedCall
from ditattn.ops.block_sparse_attention import block_sparse_attention_with_lse
from ditattn.ops.mx_linear import mx_linear, quantized_weight
from ditattn.plan.token_order import token_order
from ditattn.runtime.attend import attend

PLAN = ditattn.BlockPlan.full(300, 300)
ORDER = token_order("tile", (1, 15, 20))
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense_attention": lambda x: ditattn.dense_attention(x, x, x),
    "block_sparse_attention": lambda x: ditattn.block_sparse_attention(x, x, x, PLAN),
    "block_sparse_attention in an order": lambda x: ditattn.block_sparse_attention(x, x, x, PLAN, order=ORDER),
    "log-sum-exp": lambda x: block_sparse_attention_with_lse(x, x, x, PLAN)[1],
    "block_mean": lambda x: ditattn.block_mean(x),
    "mx_linear": lambda x: mx_linear(x, quantized_weight(torch.ones(8, 32))),
    "attend": lambda x: attend(x, x, x),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_backward_is_refused(name: str) -> None:
    x = torch.randn(1, 300, 2, 32, requires_grad=True)
    out = OPERATIONS[name](x)
    assert out.requires_grad, "cut off in silence"
    with pytest.raises(UnsupportedCall, match="forward only, and gradients were asked for"):
        out.sum().backward()
    assert x.grad is None
    with torch.no_grad():
        assert torch.equal(OPERATIONS[name](x), out.detach())
