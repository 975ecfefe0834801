"""One denoiser and the backend that serves it: layers, configuration, what was counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditattn.backends.base import AttentionBackend
from ditattn.backends.config import AttentionConfig
from ditattn.models import ModelFamily, TokenLayout
from ditattn.runtime.report import ComponentLog

__all__ = ["ServedModel"]

logger = logging.getLogger("ditattn")


@dataclass
class ServedModel:
    """One denoiser and the backend that serves it.

    Attributes:
        name: its name in the pipeline (`transformer`, `transformer_2`), or its class name.
        family: what is known about it.
        model_config: the model's own configuration.
        backend: backend class.
        config: validated configuration of the backend.
        layers: paths of its self-attention modules, in order; a layer's number is its place here.
        served_layers: numbers of the layers whose calls come here, in the order in which a forward runs them; every layer's unless the
            host leaves some alone.
        image_layers: numbers of the layers that see the image or video without the text.
        layers_by_count: a call whose layer is unknown (compiled graphs run no module hooks) is the next served call of the forward.
    """

    name: str
    family: ModelFamily
    model_config: Any
    backend: type[AttentionBackend]
    config: AttentionConfig
    layers: list[str]
    layers_by_count: bool = True

    def __post_init__(self) -> None:
        self.builder = self.backend.get_builder_cls()()
        self.builder.prepare()
        self.log = ComponentLog(self.name, self.backend.name, self.config.model_dump())
        self.served_layers = list(range(len(self.layers)))
        self.image_layers = frozenset(number for number, path in enumerate(self.layers) if self.family.is_image_only(path))

    def begin_log(self) -> None:
        """Count anew, as for another request; which implementations serve stays known."""
        self.log = ComponentLog(self.name, self.backend.name, self.config.model_dump(), implementations=self.log.implementations)

    def layer_of_call(self, call: int) -> int:
        """Number of the layer that makes the n-th served call of a forward; calls beyond the last layer go on counting."""
        beyond = call - len(self.served_layers)
        return self.served_layers[call] if beyond < 0 else len(self.layers) + beyond

    def layout_of(self, arguments: Mapping[str, Any]) -> TokenLayout | None:
        """Where the tokens of a forward with these arguments stand.

        An input form that the family does not know is no error here: the backend runs densely and counts "unknown geometry".
        """
        try:
            return self.family.layout(self.model_config, arguments)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            logger.debug("%s: token layout unknown: %s", self.name, error)
            return None
