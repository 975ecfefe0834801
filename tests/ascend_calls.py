"""Cases for the Ascend implementations, and a way to run one of them past the op's own checks."""

from __future__ import annotations

from torch import Tensor

from cases import Case, Problem
from ditattn.ops.block_sparse_attention import ascend
from ditattn.ops.dense_attention import LASER_NAMES
from ditattn.ops.dense_attention import ascend as dense_ascend

LASER = tuple(name.upper() for name in LASER_NAMES)
LASER_CASES = (
    Case("batch of 2, length 300", batch=2, layout="transposed"),
    Case("grouped heads 8 to 2, length 513", heads=8, key_heads=2, query_length=513, key_length=513),
    Case("head size 32, length 256", dim=32, query_length=256, key_length=256),
    Case("head size 96, 64 columns of padding", dim=96, query_length=448, key_length=448),
    Case("head size 128, 192 columns of padding", dim=128, query_length=320, key_length=320),
    Case("negative logits", data="negative logits", query_length=300, key_length=300),
)
BLOCK_SPARSE = (
    "MASK_TORCH_NPU",
    "MASK_MINDIESD",
    "INDEX_ATTENTIONS",
    "INDEX_MINDIESD",
    "COUNTED_SGL_KERNEL_NPU",
    "COUNTED_ATTENTIONS",
    "COUNTED_MINDIESD",
)

CASES = (
    Case("batch of 2, lengths between blocks", batch=2, query_length=700, key_length=700, plan="random", layout="transposed"),
    Case("grouped heads 8 to 2, batch of 2", batch=2, heads=8, key_heads=2, query_length=517, key_length=517, plan="random"),
    Case("head size 32", dim=32, query_length=390, key_length=517, plan="random"),
    Case("head size 96", dim=96, query_length=517, key_length=390, plan="random", layout="odd strides"),
    Case("head size 128, large logits", dim=128, query_length=517, key_length=517, plan="random", data="large logits"),
    Case("negative logits, short last block", query_length=517, key_length=517, plan="last block", data="negative logits"),
    Case("rows without a block", batch=2, query_length=517, key_length=517, plan="uneven"),
    Case("more than 32 blocks", heads=1, key_heads=1, query_length=130, key_length=33 * 128 + 5, plan="random", scale=0.2),
    Case("plan shared by batch and heads", batch=2, query_length=517, key_length=517, plan="uneven", plan_batch=1, plan_heads=1),
    Case("key lengths", batch=3, query_length=517, key_length=517, plan="uneven", key_lengths=(517, 129, 0)),
    Case("key lengths, negative logits", batch=2, key_length=300, plan="full", key_lengths=(65, 290), data="negative logits"),
)


def run(name: str, problem: Problem, return_lse: bool = False) -> tuple[Tensor, Tensor | None]:
    """One implementation on tensors of any device, as the op would call it."""
    scale = problem.query.shape[3] ** -0.5 if problem.scale is None else problem.scale
    q, k, v = problem.query, problem.key, problem.value
    out, lse = getattr(ascend, name).run(q, k, v, problem.plan, scale, False, problem.key_lengths, return_lse)
    return out.contiguous(), lse


def laser_of(name: str, problem: Problem) -> Tensor:
    """One package's Laser on tensors of any device, as the op would call it."""
    scale = problem.query.shape[3] ** -0.5 if problem.scale is None else problem.scale
    return getattr(dense_ascend, name).run(problem.query, problem.key, problem.value, scale, False, None, None)
