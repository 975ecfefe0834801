"""Other projects' block-sparse kernels on our plans, for `benchmarks.cuda_attention`.

`flex_flash`: FlexAttention through FlashAttention-4 (`kernel_options={"BACKEND": "FLASH"}`). `flash_attn_4`: its kernels, called without
torch's compiler. Both need the package flash-attn-4, and Hopper for our query blocks of 128 tokens: on Blackwell its kernels take multiples
of 256 and refuse. On GPUs before Hopper it is known to compute dense attention instead; the comparison with the reference notices that.

Source: torch 2.13 and flash-attn-4 4.0.0b36, by reading; the arms have not run yet.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ditattn.errors import BackendUnavailable
from ditattn.ops.block_sparse_attention.flex import block_mask
from ditattn.packages import Package
from ditattn.plan.block_plan import BlockPlan

__all__ = ["PEERS", "FullBlocks", "full_blocks", "prepare"]

FLASH_ATTN_4 = Package(
    "flash_attn.cute", "FlashAttention-4", "pip install --pre flash-attn-4 (with CUDA 13: 'flash-attn-4[cu13]'; Hopper or Blackwell)"
)


class FullBlocks(NamedTuple):
    """A plan as flash-attn-4's `BlockSparseTensorsTorch` takes it, field by field: every kept block is whole, none needs a mask inside.

    Attributes:
        mask_block_cnt, full_block_cnt: int32 `[B or 1, H or 1, M]`.
        mask_block_idx, full_block_idx: int32 `[B or 1, H or 1, M, K]`; places past a row's count are not read.
        block_size: tokens per query block and per key block.
    """

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def full_blocks(plan: BlockPlan) -> FullBlocks:
    """The operands of `plan`."""
    indices = plan.indices.clamp(min=0)
    return FullBlocks(torch.zeros_like(plan.counts), torch.zeros_like(indices), plan.counts, indices, (plan.block_size, plan.block_size))


def prepare(arm: str, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Callable[[], Tensor]:
    """The call `[B, S, H, D]` -> `[B, S, H, D]`. Operands are made, once, when it first runs.

    Raises:
        BackendUnavailable: when called, where the package or the device is missing.
    """
    ready = cache(partial(PEERS[arm], q, k, v, plan))
    return lambda: ready()()


def _flex_flash(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Callable[[], Tensor]:
    from torch.nn.attention import flex_attention as flex

    if "FLASH" not in typing.get_args(getattr(flex, "_Backend", None)):
        raise BackendUnavailable(f"FlexAttention of torch {torch.__version__} has no back end FLASH; torch 2.13 has")
    _check_machine(q)
    # torch 2.13 drops the plan where the mask inside blocks is trivial (pytorch/pytorch#188322); this one keeps every pair and is not
    mask = block_mask(plan, mask_mod=_every_pair)
    compiled = torch.compile(partial(flex.flex_attention, kernel_options={"BACKEND": "FLASH"}), dynamic=False)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: compiled(*heads_first, block_mask=mask).transpose(1, 2)


def _every_pair(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= 0


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan) -> Callable[[], Tensor]:
    _check_machine(q)
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    blocks: Any = BlockSparseTensorsTorch(**full_blocks(plan)._asdict())
    # it returns the log-sum-exp as well
    return lambda: flash_attn_func(q, k, v, block_sparse_tensors=blocks)[0]


def _check_machine(q: Tensor) -> None:
    if FLASH_ATTN_4.missing():
        raise BackendUnavailable(FLASH_ATTN_4.sentence())
    if q.device.type != "cuda":
        raise BackendUnavailable(f"flash-attn-4 runs on cuda, not on {q.device.type}")


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor, BlockPlan], Callable[[], Tensor]]] = {
    "flex_flash": _flex_flash,
    "flash_attn_4": _flash_attn_4,
}
