"""Block-sparse attention through torch's FlexAttention: a second, independent implementation, and a baseline. Compiled on first use.

It needs no kernel of this package on new hardware. Compilation takes seconds per combination of dtype, head size and options (and a C++
compiler on the CPU), so it runs only when asked for by name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ditattn.ops.calls import SparseCall
from ditattn.plan.block_plan import BlockPlan

__all__ = ["block_mask", "run", "why_not_compiled"]


def run(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    assert not call.causal
    assert call.key_lengths is None
    # FlexAttention takes [B, H, S, D] and, on the CPU, no strided last axis
    q, k, v = ((x if x.stride(3) == 1 else x.contiguous()).transpose(1, 2) for x in (call.query, call.key, call.value))
    options = {"scale": call.scale, "enable_gqa": q.shape[1] != k.shape[1], "return_lse": call.return_lse}
    result = _compiled()(q, k, v, block_mask=block_mask(call.plan), **options)
    out, lse = result if call.return_lse else (result, None)
    return out.transpose(1, 2), lse


def block_mask(plan: BlockPlan, mask_mod: Callable[..., Tensor] | None = None) -> Any:
    """The plan as FlexAttention's `BlockMask`: every kept block is a whole one, none needs a mask inside.

    Args:
        mask_mod: noted in the result, and never evaluated; some back ends look whether there is one.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # places past a row's count are not read, but must be block numbers; on the CPU the width is taken for the number of key blocks
    indices = pad(plan.indices.clamp(min=0), (0, plan.num_key_blocks - plan.indices.shape[-1]))
    # no block needs a mask inside; one tensor given twice breaks torch 2.13's code for the CPU
    no_counts, no_indices = torch.zeros_like(plan.counts), torch.zeros_like(indices)
    return BlockMask.from_kv_blocks(
        no_counts,
        no_indices,
        plan.counts,
        indices,
        BLOCK_SIZE=plan.block_size,
        seq_lengths=(plan.query_length, plan.key_length),
        # only the backward pass would need the transposed lists
        compute_q_blocks=False,
        mask_mod=mask_mod,
    )


def why_not_compiled() -> str | None:
    """Why FlexAttention cannot be compiled for the CPU here, or None."""
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    if any(shutil.which(compiler) for compiler in compilers):
        return None
    return f"FlexAttention needs a C++ compiler on the CPU, found none of {', '.join(compilers)}"


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
