"""MXFP4 linear layers on Ascend 950, by torch_npu's operators: dual-level MXFP4 and plain MXFP4.

Written from the operators' documentation and checked against the installed package's own signatures; never run on hardware. A weight that
stays is kept in the storage format FRACTAL_NZ for the dual-level product (`arranged`) and is int8 then; its numbers are the same.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ditattn.ops.ascend import Operator, Provider
from ditattn.ops.mx_linear.call import BLOCK, LinearCall, MXWeight, padded_features
from ditattn.ops.table import CallFacts
from ditattn.packages import TORCH_NPU

__all__ = ["DUAL_LEVEL", "PLAIN", "arranged"]

FRACTAL_NZ = 29
# rows and columns of the product are not grouped, 32 input features are
GROUP_SIZES = (1, 1, BLOCK)


@dataclass(frozen=True)
class MXProduct(Provider):
    """Two operators: one rounds the activations, `operator` multiplies."""

    quantizer: Operator

    def probe(self) -> str | None:
        return self.quantizer.why_not() or self.operator.why_not()


class DualLevel(MXProduct):
    """`npu_dynamic_dual_level_mx_quant` and `npu_dual_level_quant_matmul`."""

    def probe(self) -> str | None:
        return super().probe() or FORMAT_CAST.why_not()

    def limits(self, facts: CallFacts) -> str | None:
        return None if "dual_scale" in facts.needs else "takes weights with level-0 scales, not plain MXFP4"

    def run(self, call: LinearCall) -> Tensor:
        x, level0, level1 = self.quantizer.load()(_operand(call), smooth_scale=None)
        weight = call.weight
        assert weight.dual_scale is not None
        packed = weight.packed if weight.packed.dtype == torch.int8 else _fractal(weight.packed)
        out: Tensor = self.operator.load()(
            x,
            packed,
            level0,
            weight.dual_scale,
            level1,
            _pairs(weight.scale),
            bias=_float32(call.bias),
            output_dtype=call.x.dtype,
        )
        return out


class Plain(MXProduct):
    """`npu_dynamic_mx_quant` and `npu_quant_matmul`."""

    def run(self, call: LinearCall) -> Tensor:
        npu = importlib.import_module("torch_npu")
        x, scale = self.quantizer.load()(_operand(call), dst_type=npu.float4_e2m1fn_x2)
        out: Tensor = self.operator.load()(
            x,
            # strides, not copies: the operator reads them
            call.weight.packed.T,
            _pairs(call.weight.scale).transpose(0, 1),
            pertoken_scale=scale,
            bias=_float32(call.bias),
            output_dtype=call.x.dtype,
            x1_dtype=npu.float4_e2m1fn_x2,
            x2_dtype=npu.float4_e2m1fn_x2,
            scale_dtype=npu.float8_e8m0fnu,
            pertoken_scale_dtype=npu.float8_e8m0fnu,
            group_sizes=list(GROUP_SIZES),
        )
        return out


def _operator(name: str, takes: str) -> Operator:
    return Operator(TORCH_NPU, "npu", (name,), takes=takes, generations=("A5",), instead="'torch', which saves memory and no time")


DUAL_LEVEL = DualLevel(
    _operator("npu_dual_level_quant_matmul", "x1_level0_scale"), _operator("npu_dynamic_dual_level_mx_quant", "smooth_scale")
)
FORMAT_CAST = _operator("npu_format_cast", "customize_dtype")
PLAIN = Plain(_operator("npu_quant_matmul", "x2_dtype"), _operator("npu_dynamic_mx_quant", "dst_type"))


def arranged(weight: MXWeight) -> MXWeight:
    """The weight as this device's product wants it, for weights that stay; itself where there is none."""
    if weight.dual_scale is None or weight.packed.dtype == torch.int8 or DUAL_LEVEL.machine() or DUAL_LEVEL.probe():
        return weight
    return replace(weight, packed=_fractal(weight.packed))


def _fractal(packed: Tensor) -> Tensor:
    cast: Tensor = FORMAT_CAST.load()(packed.view(torch.int8), FRACTAL_NZ, customize_dtype=torch.int8)
    return cast


def _operand(call: LinearCall) -> Tensor:
    """x with as many features as a row of the weight holds."""
    x = call.scaled_x()
    return pad(x, (0, padded_features(x.shape[1]) - x.shape[1])).contiguous()


def _pairs(scale: Tensor) -> Tensor:
    """`[N, P / 32]` -> `[N, P / 64, 2]`."""
    return scale.unflatten(1, (-1, 2))


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
