"""How a denoiser's tokens are split between ranks, and what that means for one forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ditattn.errors import UnsupportedCall, UnsupportedModel
from ditattn.models import ModelFamily, TokenLayout
from ditattn.plan.split import ExchangeRows, GatheredRows, GatheredTokens, HeadShare

__all__ = ["WHOLE", "RankShare", "SequenceSplit", "TensorSplit", "rank_share"]


@dataclass(frozen=True)
class SequenceSplit:
    """Context parallelism as a host has switched it on for a denoiser.

    Attributes:
        ulysses: ranks that exchange tokens for heads: each has the whole sequence of its share of the heads.
        ring: ranks that keep their queries and gather all keys and values.
        rank: this one, of ulysses * ring; ranks that differ in their Ulysses place only are neighbours.
        even: every stream must be a multiple of the number of ranks.
        exchange_rows: where the host can: `[B, R, H, D]` and how many rows go to each place of the ring and how many come from each ->
            those that came.
    """

    ulysses: int
    ring: int
    rank: int
    even: bool = True
    exchange_rows: ExchangeRows | None = field(default=None, compare=False, repr=False)

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    @property
    def anything(self) -> str:
        """What allows uneven parts in diffusers' configuration: a key, which it takes with one degree alone."""
        if self.ring > 1 and self.ulysses > 1:
            return "one degree alone with ulysses_anything=True or ring_anything=True (--uneven-split)"
        return f"ContextParallelConfig(..., {'ulysses_anything' if self.ring == 1 else 'ring_anything'}=True) (--uneven-split)"

    def __str__(self) -> str:
        degrees = [f"{name} {degree}" for name, degree in (("Ulysses", self.ulysses), ("ring", self.ring)) if degree > 1]
        return f"rank {self.rank} of {self.ranks} ({', '.join(degrees)})"


@dataclass(frozen=True)
class TensorSplit:
    """Tensor parallelism: every rank has a part of the weights, so that it computes some heads of layers, for the whole sequence.

    Attributes:
        ranks: how many share the weights.
        rank: this one.
    """

    ranks: int
    rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.ranks} (tensor parallel)"


@dataclass(frozen=True)
class RankShare:
    """What a rank has of the calls of one forward.

    Attributes:
        gathered: where the tokens stand in a call that has them all; None where the sequence is not split, or its layout unknown.
        rows: which of them the rank's queries are; None where it has all.
        heads: which heads of a layer it has; None where it has all. Under tensor parallelism only layers that are split.
    """

    gathered: GatheredTokens | None = None
    rows: GatheredRows | None = None
    heads: HeadShare | None = None

    @property
    def interleaves(self) -> bool:
        """True if gathered tokens stand in another order than the model's."""
        return self.gathered is not None and self.gathered.interleaves

    def facts(self) -> dict[str, Any]:
        """Fields of the metadata of a sparse backend that speak of more than the whole."""
        found = {"gathered": self.gathered if self.interleaves else None, "rows": self.rows, "heads": self.heads}
        return {name: value for name, value in found.items() if value is not None}


WHOLE = RankShare()
"""Of a denoiser that one process runs."""


def rank_share(split: SequenceSplit | TensorSplit | None, family: ModelFamily, config: Any, layout: TokenLayout | None) -> RankShare:
    """What this rank has of a forward's calls. `config` is the model's own.

    Raises:
        UnsupportedModel, UnsupportedCall: tokens that cannot be split so.
    """
    if split is None:
        return WHOLE
    if isinstance(split, TensorSplit):
        return RankShare(heads=HeadShare(split.rank, split.ranks, family.num_heads(config)))
    if (reason := family.never_split(config)) is not None:
        raise UnsupportedModel(f"{family.name} is not served under context parallelism with {reason}")
    gathered = _gathered_tokens(split, family, layout)
    heads = HeadShare(split.rank % split.ulysses, split.ulysses, family.num_heads(config)) if split.ulysses > 1 else None
    return RankShare(gathered, _query_rows(split, gathered), heads)


def _gathered_tokens(split: SequenceSplit, family: ModelFamily, layout: TokenLayout | None) -> GatheredTokens | None:
    """The order in which gathered tokens arrive; None where their layout is unknown.

    Raises:
        UnsupportedModel: nobody has said which of the family's tokens are split apart.
        UnsupportedCall: a stream that the ranks cannot share equally although they must.
    """
    if family.streams is None:
        raise UnsupportedModel(f"{family.name} is not served under context parallelism: how its tokens are split is not known here")
    if layout is None:
        return None
    streams = family.streams(layout)
    uneven = [length for length in streams if length % split.ranks]
    if split.even and uneven:
        raise UnsupportedCall(
            f"{split.ranks} ranks cannot share {' and '.join(map(str, uneven))} tokens equally: choose a size or a text length that is a "
            f"multiple of {split.ranks}, or {split.anything}"
        )
    return GatheredTokens(streams, split.ranks)


def _query_rows(split: SequenceSplit, gathered: GatheredTokens | None) -> GatheredRows | None:
    """Which tokens a rank's queries are where it keeps them and gathers keys; None where it has all of them."""
    if gathered is None or split.ring == 1:
        return None
    return GatheredRows(gathered, split.rank // split.ulysses * split.ulysses, split.ulysses)
