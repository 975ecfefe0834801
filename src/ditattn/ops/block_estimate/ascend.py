"""The operator `sparse_block_estimate` of three packages. Never run on hardware.

It keeps near-ties within 1e-5 of the last kept block and rounds its weights to fp16; otherwise it selects as `antidiagonal.select` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ditattn.ops.ascend import Operator, Provider, padded_head_dim, to_heads_first
from ditattn.ops.block_estimate import STRIDE
from ditattn.ops.table import CallFacts
from ditattn.packages import ATTENTIONS, MINDIESD, SGL_KERNEL_NPU, Package
from ditattn.plan.block_plan import BLOCK_SIZE, num_blocks

MAX_TOKENS = 128 * 1024
# rows with fewer blocks are never capped
MIN_CAPPED_BLOCKS = 10


class EstimateInputs(NamedTuple):
    """Operands: query and key `[B, H, S, D']`; the scale of one folded product; the share of blocks that a row may keep."""

    query: Tensor
    key: Tensor
    scale: float
    row_sparse: float


def estimate_inputs(query: Tensor, key: Tensor, scale: float, sparsity: float) -> EstimateInputs:
    """`[B, S, H, D]` -> operands. The operator folds `STRIDE` tokens, so its scale is the softmax scale divided by that."""
    dim = padded_head_dim(query.shape[3])
    q, k = (to_heads_first(x, dim) for x in (query, key))
    return EstimateInputs(q, k, scale / STRIDE, row_share(num_blocks(key.shape[1]), sparsity))


def row_share(columns: int, sparsity: float) -> float:
    """The share that makes the operator keep floor(N * (1 - sparsity)) blocks, at least 1.

    It multiplies and rounds down in fp32, where 10 * (1 - 0.9) is 0 and reads outside its array: half a block more is safe from rounding.
    """
    kept = max(1, math.floor(round(columns * (1 - sparsity), 6)))
    return 1.0 if columns < MIN_CAPPED_BLOCKS else min(1.0, (kept + 0.5) / columns)


@dataclass(frozen=True)
class Estimator(Provider):
    """One package's operator. All of them have the same signature."""

    def limits(self, facts: CallFacts) -> str | None:
        if facts.num_keys is None:
            return None
        if facts.num_keys > MAX_TOKENS:
            return f"takes up to {MAX_TOKENS} tokens, not {facts.num_keys}"
        if facts.num_keys % STRIDE:
            return f"never scores the last {facts.num_keys % STRIDE} of {facts.num_keys} keys"
        return None

    def run(self, query: Tensor, key: Tensor, scale: float, sparsity: float, threshold: float) -> Tensor:
        inputs = estimate_inputs(query, key, scale, sparsity)
        options: dict[str, Any] = {"num_heads": query.shape[2], "num_key_value_heads": key.shape[2], "causal": False}
        mask, _ = self.operator.load()(
            inputs.query,
            inputs.key,
            input_layout="BNSD",
            stride=STRIDE,
            sparse_size=BLOCK_SIZE,
            scale_value=inputs.scale,
            threshold=threshold,
            keep_sink=True,
            keep_recent=True,
            row_sparse=inputs.row_sparse,
            **options,
        )
        return estimate_output(mask, key.shape[1])


def estimate_output(mask: Tensor, num_keys: int) -> Tensor:
    """int8 `[B, H, M, N']` with columns padded to 32 -> bool `[B, H, M, N]`."""
    return mask[..., : num_blocks(num_keys)].bool()


def _estimator(package: Package, namespace: str) -> Estimator:
    return Estimator(
        Operator(package, namespace, ("sparse_block_estimate",), takes="row_sparse", generations=("A2", "A3"), instead="torch")
    )


ESTIMATE_SGL_KERNEL_NPU = _estimator(SGL_KERNEL_NPU, "npu")
ESTIMATE_ATTENTIONS = _estimator(ATTENTIONS, "attentions")
ESTIMATE_MINDIESD = _estimator(MINDIESD, "mindiesd")
