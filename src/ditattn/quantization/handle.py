"""Linear layers replaced by quantised ones, and put back."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import nn

from ditattn.errors import ConfigError, UnsupportedModel
from ditattn.ops.mx_linear import TABLE
from ditattn.ops.table import choose
from ditattn.quantization.layers import Place
from ditattn.quantization.mx_layer import MXLinear
from ditattn.quantization.report import ComponentQuantization, QuantizationReport

__all__ = ["QuantizedComponent", "QuantizedModel", "refuse_saving"]


@dataclass
class _Replaced:
    """One layer in all the places where it hangs. `original` is None where originals are dropped."""

    places: list[Place]
    layer: MXLinear
    original: nn.Linear | None
    num_bytes: int

    def restore(self) -> None:
        """Hang the very same layer back, its weight where the rest of the model is now, in the model's dtype."""
        assert self.original is not None
        like = self.layer.like
        self.original.weight.data = self.original.weight.data.to(like.device, like.dtype)
        for place in self.places:
            setattr(place.parent, place.name, self.original)


@dataclass
class QuantizedComponent:
    """One denoiser: replaced layers, and what is said about the others.

    Attributes:
        keep_originals: else the weights are freed, and nothing can be undone.
    """

    module: nn.Module
    keep_originals: bool
    skipped: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    _replaced: list[_Replaced] = field(default_factory=list)

    def replace(self, places: list[Place], layer: MXLinear) -> None:
        """Hang `layer` in the place of the linear layer that hangs in all of `places`."""
        original = places[0].layer
        assert isinstance(original, nn.Linear)
        weight = original.weight
        layer.train(original.training)
        one = _Replaced(places, layer, None, weight.numel() * weight.element_size())
        if self.keep_originals:
            # memory of the device is what there is little of
            weight.data = weight.data.cpu()
            one.original = original
        for place in places:
            setattr(place.parent, place.name, layer)
        self._replaced.append(one)

    def restore(self) -> None:
        while self._replaced:
            one = self._replaced.pop()
            if one.original is not None:
                one.restore()

    @property
    def layers(self) -> list[MXLinear]:
        return [one.layer for one in self._replaced]

    def report(self) -> ComponentQuantization:
        layers = self.layers
        implementations = {choose(TABLE, layer.facts()).name for layer in layers if not layer.packed.is_meta}
        return ComponentQuantization(
            kinds=dict(Counter(layer.kind for layer in layers)),
            layers=len(layers),
            ran=sum(layer.ran for layer in layers),
            skipped=list(self.skipped),
            left_alone=dict(self.left_alone),
            bytes_before=sum(one.num_bytes for one in self._replaced),
            bytes_after=sum(layer.num_bytes() for layer in layers),
            originals="kept in host memory" if self.keep_originals else "dropped",
            implementations=sorted(implementations),
        )


class QuantizedModel:
    """What `quantize` returns: a handle and a context manager.

    Leaving it, or calling `remove`, hangs the very same layers back; the report stays readable.
    """

    def __init__(self, keep_originals: bool) -> None:
        self.components: dict[str, QuantizedComponent] = {}
        self.not_served: dict[str, str] = {}
        self._keep_originals = keep_originals
        self._undo = contextlib.ExitStack()
        self._final: QuantizationReport | None = None

    def report(self) -> QuantizationReport:
        """Layers, bytes, what computes them, and what stayed as it was."""
        if self._final is not None:
            return self._final
        return QuantizationReport({name: one.report() for name, one in self.components.items()}, dict(self.not_served))

    def remove(self) -> None:
        """Restore the pipeline. Calling it twice does nothing.

        Raises:
            ConfigError: the originals were dropped.
        """
        if not self._keep_originals:
            raise ConfigError("the original weights were dropped (keep_originals=False), so nothing can be undone: load the model again")
        self._close()

    def _close(self) -> None:
        if self._final is None:
            self._final = self.report()
        self._undo.close()

    def undo_after_failure(self) -> None:
        """Restore what can be: with dropped originals only what was not yet replaced is whole."""
        self._undo.close()

    def on_remove(self, function: Callable[[], None]) -> None:
        """Undo steps run in reverse order."""
        self._undo.callback(function)

    def __enter__(self) -> QuantizedModel:
        if not self._keep_originals:
            raise ConfigError("quantize(..., keep_originals=False) drops what leaving the block would bring back: call it without 'with'")
        if self._final is not None:
            raise ConfigError("this quantisation was removed, so nothing would be quantised in this block: call quantize again")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


@dataclass(frozen=True)
class _Refusal:
    """Stands in for `save_pretrained`; copies and pickles of the model have it too, since they are quantised as well."""

    model: str

    def __call__(self, *arguments: Any, **options: Any) -> None:
        raise UnsupportedModel(
            f"{self.model} is quantised by ditattn, and from_pretrained could not read what would be saved: save it before, or after "
            "remove(); the packed weights are in state_dict()"
        )


def refuse_saving(module: nn.Module) -> Callable[[], None]:
    """Let `module.save_pretrained` say why there is nothing to save. Returns the removal."""
    vars(module)["save_pretrained"] = _Refusal(type(module).__name__)

    def restore() -> None:
        vars(module).pop("save_pretrained", None)

    return restore
