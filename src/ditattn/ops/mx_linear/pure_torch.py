"""MXFP4 linear layers in plain torch: weights are made floating again some rows at a time, activations are rounded, and torch multiplies.

Saves memory, not time. Plain MXFP4 values are exact in bf16, so bf16 activations are multiplied in bf16, others in float32; dual-level
values are not, and are multiplied in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from ditattn.ops.mx_linear.call import LinearCall, padded_features
from ditattn.ops.mx_linear.mx_format import chunks, dequantized, dual_dtype, rounded, rounded_dual

__all__ = ["run"]


def run(call: LinearCall) -> Tensor:
    dual_level = call.weight.dual_scale is not None
    dtype = torch.bfloat16 if call.x.dtype == torch.bfloat16 and not dual_level else torch.float32
    x = _rounded_activations(call, dtype)
    bias = None if call.bias is None else call.bias.to(dtype)
    out = call.x.new_empty(x.shape[0], call.weight.out_features)
    for rows in chunks(call.weight.out_features, x.shape[1]):
        weight = dequantized(call.weight, dtype, rows)
        out[:, rows] = linear(x, weight, None if bias is None else bias[rows])
    return out


def _rounded_activations(call: LinearCall, dtype: torch.dtype) -> Tensor:
    """`[tokens, P]`, some tokens at a time: float32 copies of all of them would be twice as large as they are."""
    x, width = call.scaled_x(), padded_features(call.weight.in_features)
    out = x.new_empty(x.shape[0], width, dtype=dtype)
    for rows in chunks(x.shape[0], width):
        if call.weight.dual_scale is None:
            out[rows] = rounded(pad(x[rows].float(), (0, width - x.shape[1])))
        else:
            out[rows] = rounded_dual(x[rows].to(dual_dtype(x.dtype)))[:, :width]
    return out
