"""Dense attention on Ascend NPUs: three packages that bring the Laser operator, and the fused operator of torch_npu.

Written from the operators' documentation and checked against the installed packages' own signatures; never run on hardware. The steps
around Laser are pure functions, tested on the CPU against a stand-in that follows the operator's documented semantics.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ditattn.ops.ascend import Operator, Provider, to_heads_first
from ditattn.ops.calls import DenseCall
from ditattn.ops.table import CallFacts
from ditattn.packages import ATTENTIONS, MINDIESD, SGL_KERNEL_NPU, Package

# The operator takes query and key lengths in multiples of 256 and a head size of 128.
LASER_LENGTH_MULTIPLE = 256
LASER_HEAD_DIM = 128
LASER_MAX_TOKENS = 128 * 1024
# `pre_tokens` carries the number of zero-padded key columns; this value means none.
LASER_NO_PADDING = 2**31 - 1
# bf16 reaches further than fp16. Dividing q, k and v by a power of two keeps them and the operator's fp16 scores, which it stores before
# the softmax scale, in range; the scale and the output take the factors back. Magnitudes from 2^-9 up lose no bit, smaller ones move by
# at most 2^-17.
LASER_BF16_DIVISOR = 256.0


class LaserInputs(NamedTuple):
    """Operands of the operator: tensors `[B, H, S', 128]` in fp16, S' a multiple of 256."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    pre_tokens: int


@dataclass(frozen=True)
class Laser(Provider):
    """One package's Laser operator. All of them have the same signature."""

    def limits(self, facts: CallFacts) -> str | None:
        if facts.num_keys is not None and facts.num_keys > LASER_MAX_TOKENS:
            return f"Laser takes up to {LASER_MAX_TOKENS} tokens, not {facts.num_keys}"
        return None

    def run(self, call: DenseCall) -> Tensor:
        inputs = _la_preprocess_input(call)
        _, out = self.operator.load()(
            inputs.query,
            inputs.key,
            inputs.value,
            scale_value=inputs.scale,
            head_num=call.query.shape[2],
            input_layout="BNSD",
            keep_prob=1.0,
            pre_tokens=inputs.pre_tokens,
            next_tokens=1,
            is_highPrecision=True,
        )
        return _la_postprocess_output(out, call.query)


def _laser(package: Package, namespace: str, name: str) -> Laser:
    instead = "fa, rain_fusion_attn or block_sparse_attn"
    return Laser(Operator(package, namespace, (name,), takes="is_highPrecision", generations=("A2", "A3"), instead=instead))


LASER_SGL_KERNEL_NPU = _laser(SGL_KERNEL_NPU, "npu", "laser_attn")
LASER_ATTENTIONS = _laser(ATTENTIONS, "attentions", "la")
LASER_MINDIESD = _laser(MINDIESD, "mindiesd", "la")


def _la_preprocess_input(call: DenseCall) -> LaserInputs:
    """A call with as many queries as keys -> what the operator takes."""
    padding = -call.query.shape[1] % LASER_LENGTH_MULTIPLE
    divisor = LASER_BF16_DIVISOR if call.query.dtype == torch.bfloat16 else 1.0
    q, k, v = (_to_laser(x, padding, divisor) for x in (call.query, call.key, call.value))
    return LaserInputs(q, k, v, call.scale * divisor * divisor, padding or LASER_NO_PADDING)


def _to_laser(x: Tensor, padding: int, divisor: float) -> Tensor:
    x = (x if divisor == 1 else x / divisor).to(torch.float16)
    return to_heads_first(x, LASER_HEAD_DIM, x.shape[1] + padding)


def _la_postprocess_output(out: Tensor, query: Tensor) -> Tensor:
    """The operator's fp32 `[B, H, S', 128]` -> `[B, S, H, D]` in the query's dtype."""
    divisor = LASER_BF16_DIVISOR if query.dtype == torch.bfloat16 else 1.0
    out = out[:, :, : query.shape[1], : query.shape[3]].transpose(1, 2)
    return (out if divisor == 1 else out * divisor).to(query.dtype)


def run_fused(call: DenseCall) -> Tensor:
    torch_npu = importlib.import_module("torch_npu")
    out: Tensor = torch_npu.npu_fused_infer_attention_score(
        call.query.contiguous(),
        call.key.contiguous(),
        call.value.contiguous(),
        num_heads=call.query.shape[2],
        num_key_value_heads=call.key.shape[2],
        scale=call.scale,
        input_layout="BSND",
    )[0]
    return out
