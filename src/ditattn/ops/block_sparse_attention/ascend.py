"""Block-sparse attention on Ascend NPUs: operators that take a block mask, lists of block indices, or a mask with counts.

Written from the operators' documentation and checked against the installed packages' own signatures; never run on hardware.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditattn.devices.npu import soc_generation
from ditattn.ops.ascend import Operator, Provider, first_of
from ditattn.ops.block_sparse_attention.ascend_layout import BNSD, TND
from ditattn.ops.block_sparse_attention.ascend_operands import counted_inputs, index_inputs, mask_inputs, mask_lse, output
from ditattn.ops.calls import SparseCall
from ditattn.ops.table import CallFacts
from ditattn.packages import ATTENTIONS, MINDIESD, SGL_KERNEL_NPU, TORCH_NPU, Package

# the kernels give each group of query heads a share of 128 rows
GROUP_ROWS = 128
FP32_SOFTMAX = 0
# Ascend 950 knows one mode only: a 16-bit softmax whose partial results are rescaled in fp32
A5_SOFTMAX = 4
# the only mode of the operator with counts that is compiled for fp16 and bf16; bf16 computes its softmax in fp32 there
COUNTED_SOFTMAX = 1


def _group_refusal(facts: CallFacts) -> str | None:
    if facts.group >= GROUP_ROWS or GROUP_ROWS % facts.group:
        return f"takes 1, 2, 4, ... 64 query heads per key head, not {facts.group}"
    return None


def inner_precise(generation: str | None) -> int:
    """The softmax mode of the operators that take a mask."""
    return A5_SOFTMAX if generation == "A5" else FP32_SOFTMAX


@dataclass(frozen=True)
class Masked(Provider):
    """CANN's BlockSparseAttention, as torch_npu and mindiesd call it."""

    def limits(self, facts: CallFacts) -> str | None:
        if self.operator.package is TORCH_NPU and facts.dtype == torch.bfloat16 and soc_generation() == "A5":
            reason = "torch_npu allows bfloat16 with inner_precise 0 only and Ascend 950 knows 4 only"
            return f"{reason}: load the model in float16, or use mask_mindiesd ({MINDIESD.install})"
        return _group_refusal(facts)

    def run(self, call: SparseCall) -> tuple[Tensor, Tensor | None]:
        block_size = call.plan.block_size
        inputs = mask_inputs(call)
        out, lse = self.operator.load()(
            inputs.query,
            inputs.key,
            inputs.value,
            block_sparse_mask=inputs.mask,
            block_shape=[block_size, block_size],
            q_input_layout=inputs.layout,
            kv_input_layout=inputs.layout,
            num_key_value_heads=call.key.shape[2],
            scale_value=call.scale,
            inner_precise=inner_precise(soc_generation()),
            actual_seq_lengths=inputs.query_lengths,
            actual_seq_lengths_kv=inputs.key_lengths,
            softmax_lse_flag=int(call.return_lse),
        )
        return output(out, inputs.layout, call, inputs.empty), mask_lse(lse, call, inputs) if call.return_lse else None


@dataclass(frozen=True)
class Indexed(Provider):
    """CANN's RainFusionAttention. The argument head_num is CANN's number of key heads."""

    def limits(self, facts: CallFacts) -> str | None:
        return _group_refusal(facts)

    def run(self, call: SparseCall) -> tuple[Tensor, Tensor | None]:
        block_size = call.plan.block_size
        inputs = index_inputs(call)
        out, _ = self.operator.load()(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.indices,
            inputs.counts,
            [block_size, block_size],
            actual_seq_qlen=inputs.query_lengths,
            actual_seq_kvlen=inputs.key_lengths,
            q_input_layout=TND,
            kv_input_layout=TND,
            head_num=call.key.shape[2],
            mask_type=0,
            scale=call.scale,
            inner_precise=FP32_SOFTMAX,
        )
        return output(out, TND, call, inputs.empty), None


@dataclass(frozen=True)
class Counted(Provider):
    """Ada block-sparse attention. float16 computes its softmax in fp16 here."""

    def run(self, call: SparseCall) -> tuple[Tensor, Tensor | None]:
        block_size = call.plan.block_size
        inputs = counted_inputs(call)
        result = self.operator.load()(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.mask,
            inputs.counts,
            input_layout=BNSD,
            sparse_size=block_size,
            num_heads=call.query.shape[2],
            num_key_value_heads=call.key.shape[2],
            scale_value=call.scale,
            causal=False,
            inner_precise=COUNTED_SOFTMAX,
        )
        return output(first_of(result), BNSD, call, inputs.empty), None


def _masked(package: Package, namespace: str, name: str) -> Masked:
    return Masked(Operator(package, namespace, (name,), takes="block_sparse_mask", generations=("A2", "A3", "A5"), min_cann=(9, 0)))


def _on_910(package: Package, namespace: str, names: tuple[str, ...], takes: str) -> Operator:
    return Operator(package, namespace, names, takes, generations=("A2", "A3"), instead="mask_mindiesd or mask_torch_npu")


_ADA = ("ada_block_sparse_attention", "block_sparse_attention")

MASK_TORCH_NPU = _masked(TORCH_NPU, "npu", "npu_block_sparse_attention")
MASK_MINDIESD = _masked(MINDIESD, "mindiesd", "block_sparse_attention")
INDEX_ATTENTIONS = Indexed(_on_910(ATTENTIONS, "attentions", ("rainfusionattention",), "select_idx"))
INDEX_MINDIESD = Indexed(_on_910(MINDIESD, "mindiesd", ("rainfusionattention",), "select_idx"))
COUNTED_SGL_KERNEL_NPU = Counted(_on_910(SGL_KERNEL_NPU, "npu", _ADA[:1], "sparse_count_table"))
COUNTED_ATTENTIONS = Counted(_on_910(ATTENTIONS, "attentions", _ADA, "sparse_count_table"))
COUNTED_MINDIESD = Counted(_on_910(MINDIESD, "mindiesd", _ADA, "sparse_count_table"))
