"""What attention modules chose in diffusers' own way (`_attention_backend` on their processors), kept and put back."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["keep_choices"]

CHOICE = "_attention_backend"


def keep_choices(names: set[str]) -> Callable[[], None]:
    """Remember what every processor of this process chose. Returns what puts it back on those that then name one of `names`.

    Processors that are newer get the default of their class.
    """
    before = WeakIdKeyDictionary({processor: vars(processor)[CHOICE] for processor in _processors() if CHOICE in vars(processor)})

    def put_back() -> None:
        for processor in list(_processors()):
            if getattr(vars(processor).get(CHOICE), "value", None) not in names:
                continue
            if processor in before:
                setattr(processor, CHOICE, before[processor])
            else:
                delattr(processor, CHOICE)

    return put_back


def _processors() -> Iterator[Any]:
    """Every object of this process that is the attention processor of a module: diffusers keeps no list of them."""
    for candidate in gc.get_objects():
        # `isinstance` would ask proxies for their class
        if issubclass(type(candidate), nn.Module):
            own = vars(candidate)
            processor = own.get("processor") or own.get("_modules", {}).get("processor")
            if hasattr(processor, "__dict__"):
                yield processor
