"""One denoiser, quantised: from its own weights, or from a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from ditattn.errors import ConfigError, UnsupportedModel
from ditattn.models import ModelFamily
from ditattn.ops.mx_linear import TABLE, quantized_weight
from ditattn.ops.table import choose
from ditattn.quantization.handle import QuantizedComponent
from ditattn.quantization.layers import Place, blocks_of, matching, places, why_left_alone
from ditattn.quantization.msmodelslim import Checkpoint
from ditattn.quantization.mx_layer import MXLinear

__all__ = [
    "by_path",
    "check_any",
    "layers_of_checkpoint",
    "layers_of_rule",
    "open_checkpoint",
    "reading",
    "replace_layers",
    "rounding",
    "warn_without_units",
]

logger = logging.getLogger("ditattn")

Make = Callable[[str, nn.Linear], MXLinear]


def by_path(found: list[Place]) -> dict[str, list[Place]]:
    """Places of the same layer together, by the first one's path."""
    of_layer: dict[int, str] = {}
    grouped: dict[str, list[Place]] = {}
    for place in found:
        grouped.setdefault(of_layer.setdefault(id(place.layer), place.path), []).append(place)
    return grouped


def layers_of_rule(module: nn.Module, family: ModelFamily, self_attention: list[str]) -> dict[str, list[Place]]:
    """The layers that the family's rule names, by path."""
    return by_path(matching(places(module), family, blocks_of(self_attention)))


def layers_of_checkpoint(module: nn.Module, checkpoint: Checkpoint) -> dict[str, list[Place]]:
    """The layers that a checkpoint has in FP4, by path, whatever the family's rule says.

    Raises:
        ConfigError: a layer that the model does not have.
    """
    found = by_path(list(places(module)))
    if unknown := [layer for layer in checkpoint.quantized() if layer not in found]:
        others = "" if len(unknown) == 1 else f" and {len(unknown) - 1} more"
        raise ConfigError(f"{checkpoint.folder} is not of this model: it has no linear layer {unknown[0]}{others}")
    if not checkpoint.quantized():
        raise ConfigError(f"{checkpoint.folder}: every layer is FLOAT, so there is nothing to quantise")
    return {layer: found[layer] for layer in checkpoint.quantized()}


def rounding(method: str) -> Make:
    """Layers made of their own weights."""

    def make(path: str, layer: nn.Linear) -> MXLinear:
        weight = quantized_weight(layer.weight.detach(), dual_level=method == "mxfp4_dualscale")
        return MXLinear(weight, layer.bias, layer.weight.dtype, method)

    return make


def reading(checkpoint: Checkpoint) -> Make:
    """Layers read from a checkpoint."""

    def make(path: str, layer: nn.Linear) -> MXLinear:
        stored = checkpoint.read(path, (layer.out_features, layer.in_features))
        bias = layer.bias if stored.bias is None else _bias(path, layer, stored.bias)
        made = MXLinear(stored.weight, None, layer.weight.dtype, checkpoint.kinds[path], stored.mul_scale).to(layer.weight.device)
        made.register_parameter("bias", bias)
        return made

    return make


def _bias(path: str, layer: nn.Linear, bias: Tensor) -> nn.Parameter:
    if layer.bias is None or bias.shape != layer.bias.shape:
        raise ConfigError(f"{path}: the checkpoint has a bias {list(bias.shape)}, the model {'none' if layer.bias is None else 'another'}")
    return nn.Parameter(bias.to(layer.bias.device, layer.bias.dtype), requires_grad=False)


def replace_layers(component: QuantizedComponent, layers: dict[str, list[Place]], skipped: set[str], make: Make) -> None:
    """Quantise `layers` but those that are skipped or that cannot be; names these."""
    for path, found in layers.items():
        layer = found[0].layer
        if path in skipped:
            component.skipped.append(path)
        elif reason := why_left_alone(layer):
            component.left_alone[path] = reason
        else:
            assert isinstance(layer, nn.Linear)
            component.replace(found, make(path, layer))


def check_any(components: Iterable[QuantizedComponent]) -> None:
    """Raise UnsupportedModel unless some layer was quantised."""
    found = list(components)
    if not any(component.layers for component in found):
        left_alone = [f"{path}: {reason}" for component in found for path, reason in component.left_alone.items()]
        raise UnsupportedModel(f"no linear layer can be quantised ({left_alone[0] if left_alone else 'all are skipped'})")


def warn_without_units(component: QuantizedComponent) -> None:
    """Say once where 4-bit numbers are not multiplied as such."""
    for layer in component.layers[:1]:
        row = choose(TABLE, layer.facts())
        if not row.name.startswith("ascend"):
            _warn_once(layer.packed.device.type, row.name)


@cache
def _warn_once(device: str, name: str) -> None:
    logger.warning(
        "FP4 layers on %s: none of its FP4 units, if it has any, are used ('%s' computes them), so this saves memory and costs time",
        device,
        name,
    )


def open_checkpoint(folder: Path, component: str, only: bool, family: ModelFamily) -> Checkpoint | None:
    """The checkpoint of one component: the folder itself where there is one denoiser, else a folder in it; None if there is none for it."""
    inner = [folder / component, *([folder / family.checkpoint_folders[component]] if component in family.checkpoint_folders else [])]
    found = next((path for path in inner if path.is_dir()), folder if only else None)
    return None if found is None else Checkpoint.open(found, family.checkpoint_names)
