"""Which linear layers of a denoiser can be quantised, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ditattn.errors import ConfigError
from ditattn.models import ModelFamily
from ditattn.quantization.mx_layer import MXLinear

__all__ = ["Place", "blocks_of", "matching", "places", "why_left_alone"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# where peft keeps the layer that it wraps
WRAPPED = "base_layer"


@dataclass(frozen=True)
class Place:
    """Where a linear layer hangs. One layer may hang in several places.

    Attributes:
        path: from the denoiser, without the names of wrappers around the layer.
        parent, name: `getattr(parent, name)` is the layer.
    """

    path: str
    parent: nn.Module
    name: str

    @property
    def layer(self) -> nn.Module:
        found: nn.Module = getattr(self.parent, self.name)
        return found


def places(module: nn.Module, path: str = "") -> Iterator[Place]:
    """Every linear layer, ours included, in the order of registration. Of a wrapped layer (LoRA) only what is wrapped."""
    for name, child in module.named_children():
        below = path if name == WRAPPED else f"{path}.{name}".lstrip(".")
        if isinstance(child, (nn.Linear, MXLinear)):
            yield Place(below, module, name)
        elif hasattr(child, WRAPPED):
            yield from (place for place in places(child, below) if place.name == WRAPPED)
        else:
            yield from places(child, below)


def blocks_of(self_attention: Iterable[str]) -> tuple[str, ...]:
    """Paths of the blocks that hold these self-attention modules."""
    return tuple(dict.fromkeys(path.rpartition(".")[0] for path in self_attention))


def matching(found: Iterable[Place], family: ModelFamily, blocks: tuple[str, ...]) -> list[Place]:
    """The linear layers that the family's rule names: attention projections and feed-forward of its blocks."""
    chosen = []
    for place in found:
        block = next((block for block in blocks if place.path.startswith(block + ".")), None)
        if block is not None and family.is_linear_layer(place.path[len(block) + 1 :]):
            chosen.append(place)
    return chosen


def skipped(patterns: Iterable[str], paths: dict[str, list[str]]) -> set[tuple[str, str]]:
    """(component, path) of the layers that the patterns name, as `blocks.0.*` or `transformer_2.blocks.0.*`.

    Raises:
        ConfigError: a pattern that names none.
    """
    everything = [(component, path) for component, found in paths.items() for path in found]
    named: set[tuple[str, str]] = set()
    for pattern in patterns:
        hits = {(c, path) for c, path in everything if fnmatchcase(path, pattern) or fnmatchcase(f"{c}.{path}", pattern)}
        if not hits:
            example = everything[0][1] if everything else "none"
            raise ConfigError(f"skip: no linear layer is called {pattern}; they are called like {example}, and * stands for anything")
        named |= hits
    return named


def why_left_alone(layer: nn.Module) -> str | None:
    """Why a layer stays as it is, or None."""
    if isinstance(layer, MXLinear):
        return f"quantised already ({layer.kind})"
    if type(layer) is not nn.Linear:
        return f"quantised already or special: it is a {type(layer).__module__}.{type(layer).__qualname__}"
    weight = layer.weight
    if not isinstance(weight, FakeTensor) and (type(weight) is not nn.Parameter or type(weight.data) is not Tensor):
        return f"quantised already: its weight is of class {type(weight).__qualname__}"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}, not one of float32, bfloat16, float16"
    if weight.is_meta:
        return "its weight is on meta: quantise before weights are offloaded"
    return _why_hooked(layer)


def _why_hooked(layer: nn.Linear) -> str | None:
    """Another module would not have what other packages put on this one."""
    own = vars(layer)
    hooks = [layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks]
    if "_hf_hook" in own or "_diffusers_hook" in own or "forward" in own or any(hooks):
        return "hooks hang on it (offloading, casting): quantise before they are put there"
    return None
