"""Sequences that several ranks share: where the tokens stand after the ranks' parts were gathered.

Context parallelism splits every stream of a denoiser's tokens (text, image) apart. Each rank lays its parts behind each other, so that a
gathered sequence is `[text of rank 0, image of rank 0, text of rank 1, ...]`: not the model's order where there are several streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ditattn.plan.token_order import TokenOrder

__all__ = ["GatheredTokens"]


@dataclass(frozen=True)
class GatheredTokens:
    """The order of a gathered sequence.

    Attributes:
        streams: lengths of the streams in the model's order; empty ones count for nothing.
        ranks: how many have a part of each stream. Parts are as equal as possible, longer ones first, as `torch.tensor_split` makes them.
    """

    streams: tuple[int, ...]
    ranks: int

    @property
    def interleaves(self) -> bool:
        """False if the gathered sequence is in the model's order."""
        return self.ranks > 1 and sum(length > 0 for length in self.streams) > 1

    def tokens(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 `[S]`: the gathered sequence holds at position j the model's token `tokens[j]`."""
        return _tokens(self, torch.device(device))

    def places(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 `[S]`: the model's token i stands at position `places[i]` of the gathered sequence."""
        return _places(self, torch.device(device))

    def ordered(self, order: TokenOrder, device: torch.device | str = "cpu") -> TokenOrder:
        """An order of the model's tokens, on `device`, as one that reads the gathered sequence."""
        places, tokens = self.places(device), self.tokens(device)
        forward = places if order.forward is None else places[order.forward]
        inverse = tokens if order.inverse is None else order.inverse[..., tokens]
        return TokenOrder(forward, inverse, order.first_frame, order.video, order.length)


@lru_cache(maxsize=32)
def _tokens(split: GatheredTokens, device: torch.device) -> Tensor:
    # tensors made in inference mode could not be used later where gradients are recorded
    with torch.inference_mode(False):
        parts = [stream.tensor_split(split.ranks) for stream in torch.arange(sum(split.streams)).split(split.streams)]
        return torch.cat([part for rank in zip(*parts, strict=True) for part in rank]).to(device)


@lru_cache(maxsize=32)
def _places(split: GatheredTokens, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _tokens(split, torch.device("cpu")).argsort().to(device)
