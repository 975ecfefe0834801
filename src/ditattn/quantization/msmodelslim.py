"""Checkpoints of msmodelslim, which quantises for Ascend: what each linear layer is, and its tensors.

A folder with `quant_model_description*.json` and safetensors files. The description names the kind of every tensor: W4A4_MXFP4,
W4A4_MXFP4_DUALSCALE, FLOAT. Tensors of a layer, as msmodelslim and MindIE-SD have them:

    weight             uint8 [N, K / 2], two e2m1 values a byte, or float8_e4m3fn [N, K], one value a byte
    weight_scale       uint8 [N, K / 32], e8m0
    weight_dual_scale  float32 [N, K / 512, 1]
    mul_scale          float32 [K], multiplied into the activation
    bias               [N]

Layers wrapped for calibration are called `NAME.linear`, and their factors `NAME.div.mul_scale`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ditattn.errors import ConfigError
from ditattn.ops.mx_linear import MXWeight
from ditattn.ops.mx_linear.call import BLOCK, DUAL_BLOCK, padded_features
from ditattn.ops.mx_linear.mx_format import E2M1_VALUES
from ditattn.quantization.request import DESCRIPTION

__all__ = ["FLOAT", "Checkpoint", "StoredLayer"]

FLOAT, PLAIN, DUAL = "FLOAT", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE"
TENSORS = ("weight", "weight_scale", "weight_dual_scale", "mul_scale", "bias")
ONES_DTYPE = torch.float8_e4m3fn


@dataclass(frozen=True)
class StoredLayer:
    """One quantised layer of a checkpoint."""

    weight: MXWeight
    bias: Tensor | None
    mul_scale: Tensor | None


@dataclass(frozen=True)
class Checkpoint:
    """A folder, its kinds by layer, and where each tensor is.

    Attributes:
        kinds: by the layer's name, as `rename` makes it.
        files: (file, key) by (layer, tensor).
    """

    folder: Path
    kinds: Mapping[str, str]
    files: Mapping[tuple[str, str], tuple[Path, str]]

    @classmethod
    def open(cls, folder: Path, names: tuple[tuple[str, str], ...] = ()) -> Checkpoint:
        """Read the description and the files' tables of contents.

        Args:
            folder: of one denoiser.
            names: (regular expression, replacement) that turn the checkpoint's names of layers into the model's.

        Raises:
            ConfigError: no description, no safetensors files, or a kind of a layer that is not known.
        """
        rename = _renaming(names)
        kinds: dict[str, str] = {}
        for key, kind in _description(folder).items():
            if key.endswith(".weight") and isinstance(kind, str):
                layer = rename(key.removesuffix(".weight"))
                kinds[layer] = kind
                if kind not in (FLOAT, PLAIN, DUAL):
                    raise ConfigError(f"{folder}: layer {layer} is of kind {kind}; what can be read is {PLAIN}, {DUAL}, {FLOAT}")
        return cls(folder, kinds, _contents(folder, rename))

    def quantized(self) -> list[str]:
        """Names of the layers that are not FLOAT."""
        return [layer for layer, kind in self.kinds.items() if kind != FLOAT]

    def read(self, layer: str, shape: tuple[int, int]) -> StoredLayer:
        """A quantised layer whose plain weight has `shape` [N, K].

        Raises:
            ConfigError: a tensor that is missing, of another shape or type, or holds what e2m1 cannot.
        """
        rows, columns = shape
        dual_level = self.kinds[layer] == DUAL
        blocks = -(-columns // BLOCK)
        scale = self._tensor(layer, "weight_scale", torch.uint8).reshape(rows, -1) if rows else torch.empty(0)
        self._demand(scale.shape[1] in (blocks, padded_features(columns) // BLOCK), layer, "weight_scale", scale, f"[{rows}, {blocks}]")
        width = padded_features(columns)
        scale = pad(scale, (0, width // BLOCK - scale.shape[1]))
        dual = None
        if dual_level:
            dual = self._tensor(layer, "weight_dual_scale", torch.float32)
            large = -(-columns // DUAL_BLOCK)
            self._demand(dual.numel() == rows * large and dual.shape[0] == rows, layer, "weight_dual_scale", dual, f"[{rows}, {large}, 1]")
            dual = dual.reshape(rows, large).T.contiguous()
        weight = MXWeight(columns, self._packed(layer, rows, columns), scale.contiguous(), dual)
        bias = self._tensor(layer, "bias") if (layer, "bias") in self.files else None
        return StoredLayer(weight, bias, self._mul_scale(layer, columns))

    def _packed(self, layer: str, rows: int, columns: int) -> Tensor:
        """uint8 `[N, P / 2]`."""
        weight = self._tensor(layer, "weight")
        if weight.dtype == ONES_DTYPE:
            self._demand(weight.shape == (rows, columns), layer, "weight", weight, f"[{rows}, {columns}]")
            codes = self._codes(layer, weight.float())
            codes = pad(codes, (0, padded_features(columns) - columns))
            return codes[:, ::2] | (codes[:, 1::2] << 4)
        expected = f"uint8 [{rows}, {columns // 2}] or {ONES_DTYPE} [{rows}, {columns}]"
        self._demand(
            weight.dtype == torch.uint8 and weight.shape == (rows, columns // 2) and columns % 2 == 0, layer, "weight", weight, expected
        )
        return pad(weight, (0, padded_features(columns) // 2 - weight.shape[1]))

    def _codes(self, layer: str, values: Tensor) -> Tensor:
        table = torch.tensor(E2M1_VALUES)
        codes = torch.bucketize(values.abs(), table).clamp(max=len(table) - 1)
        if not torch.equal(table[codes], values.abs()):
            raise ConfigError(f"{self.folder}: {layer}.weight holds values that are not of FP4 (e2m1)")
        return (codes | (values.signbit().long() << 3)).to(torch.uint8)

    def _mul_scale(self, layer: str, columns: int) -> Tensor | None:
        """None where there is none, or where it is 1 throughout."""
        if (layer, "mul_scale") not in self.files:
            return None
        scale = self._tensor(layer, "mul_scale").float().flatten()
        self._demand(scale.shape == (columns,), layer, "mul_scale", scale, f"[{columns}]")
        return None if bool((scale == 1).all()) else scale

    def _tensor(self, layer: str, name: str, dtype: torch.dtype | None = None) -> Tensor:
        from safetensors import safe_open

        if (layer, name) not in self.files:
            raise ConfigError(f"{self.folder}: {layer} is described as {self.kinds[layer]}, and its {name} is in no file")
        path, key = self.files[layer, name]
        with safe_open(str(path), framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        # e8m0 by its own type
        if dtype == torch.uint8 and tensor.dtype == torch.float8_e8m0fnu:
            tensor = tensor.view(torch.uint8)
        self._demand(dtype is None or tensor.dtype == dtype, layer, name, tensor, str(dtype))
        return tensor

    def _demand(self, holds: bool, layer: str, name: str, tensor: Tensor, expected: str) -> None:
        if not holds:
            raise ConfigError(f"{self.folder}: {layer}.{name} should be {expected}, not {tensor.dtype} {list(tensor.shape)}")


def _renaming(names: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    def rename(layer: str) -> str:
        layer = layer.removesuffix(".linear").removesuffix(".div")
        for pattern, replacement in names:
            layer = re.sub(pattern, replacement, layer)
        return layer

    return rename


def _description(folder: Path) -> dict[str, Any]:
    found = sorted(folder.glob(f"{DESCRIPTION}*.json"))
    if len(found) != 1:
        what = "no" if not found else f"several ({', '.join(path.name for path in found)}), not one"
        raise ConfigError(f"{folder}: {what} {DESCRIPTION}*.json, which says how each layer is quantised")
    try:
        description = json.loads(found[0].read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{found[0]} is no JSON: {error}") from None
    if not isinstance(description, dict):
        raise ConfigError(f"{found[0]} should be a mapping from tensors to kinds")
    return description


def _contents(folder: Path, rename: Callable[[str], str]) -> dict[tuple[str, str], tuple[Path, str]]:
    from safetensors import safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f"; there is {', '.join(others)}, which is not read because it can hold code" if others else ""
        raise ConfigError(f"{folder}: no .safetensors file{found}")
    files = {}
    for path in paths:
        with safe_open(str(path), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                layer, _, tensor = key.rpartition(".")
                if tensor in TENSORS:
                    files[rename(layer), tensor] = (path, key)
    return files
