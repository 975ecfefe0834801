"""Writes a checkpoint as msmodelslim does, from a model's own weights, by the spelled-out rounding of the reference.

Names and shapes are those that MindIE-SD (`mindiesd/quantization/layer.py`) and sglang (`multimodal_gen/tools/wan_repack.py`) read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ditattn.ops.mx_linear import reference

PLAIN, DUAL, FLOAT = "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE", "FLOAT"
# from diffusers' names of a Wan block to those of Wan's own repository
WAN_NAMES = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def filled(x: Tensor, multiple: int) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:-1], -x.shape[-1] % multiple)], dim=-1)


def stored(weight: Tensor, kind: str, *, packed: bool) -> dict[str, Tensor]:
    """The tensors of one layer."""
    columns = weight.shape[1]
    found: dict[str, Tensor] = {}
    values = weight.float()
    if kind == DUAL:
        values = weight.bfloat16()
        level0 = reference.level0(values)
        found["weight_dual_scale"] = level0.float().unsqueeze(-1)
        values = (values.float() / level0.float().repeat_interleave(512, dim=-1)[:, :columns]).bfloat16().float()
    values = filled(values, 32)
    exponents = reference.shared_exponents(values)
    found["weight_scale"] = exponents.to(torch.uint8)
    codes = reference.nearest_codes(values.double() / reference._scales(exponents))[:, :columns]
    if packed:
        found["weight"] = (codes[:, ::2] | (codes[:, 1::2] << 4)).to(torch.uint8)
    else:
        size = torch.tensor(reference.VALUES)[codes & 7]
        found["weight"] = torch.where(codes >= 8, -size, size).to(torch.float8_e4m3fn)
    return found


def write(
    folder: Path,
    model: nn.Module,
    kinds: dict[str, str],
    *,
    packed: bool = False,
    mul_scales: dict[str, Tensor] | None = None,
    wan_names: bool = False,
    description: dict[str, Any] | None = None,
    name: str = "quant_model_weights.safetensors",
) -> None:
    """Checkpoint of the layers in `kinds`, the rest of `model` FLOAT.

    Args:
        mul_scales: by layer; its weight is divided by them first, and the file holds them, as `NAME.div.mul_scale` with `wan_names`.
        description: what else stands in the description.
    """
    mul_scales = mul_scales or {}
    tensors: dict[str, Tensor] = {}
    described: dict[str, Any] = {"model_quant_type": "W4A4_MXFP4", "version": "1.0.0", **(description or {})}
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        kind = kinds.get(path, FLOAT)
        written = path
        if wan_names:
            for ours, theirs in WAN_NAMES.items():
                written = written.replace(ours, theirs)
        inner = f"{written}.linear" if wan_names and path in mul_scales else written
        weight = layer.weight.detach()
        parts = {"weight": weight}
        if kind != FLOAT:
            parts = stored(weight / mul_scales[path] if path in mul_scales else weight, kind, packed=packed)
        if layer.bias is not None:
            parts["bias"] = layer.bias.detach()
        for part, tensor in parts.items():
            tensors[f"{inner}.{part}"] = tensor.contiguous().clone()
            described[f"{inner}.{part}"] = kind
        if path in mul_scales:
            key = f"{written}.div.mul_scale" if wan_names else f"{written}.mul_scale"
            tensors[key] = mul_scales[path]
            described[key] = kind
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name)
    (folder / "quant_model_description.json").write_text(json.dumps(described))
