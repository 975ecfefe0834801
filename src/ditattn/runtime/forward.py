"""One running forward of a denoiser, and which one runs in this thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ditattn.backends.base import AttentionMetadata, CallRecord
from ditattn.backends.sparse import SparseAttentionMetadata
from ditattn.models import TokenLayout
from ditattn.plan.reuse import ForwardId
from ditattn.runtime.key_padding import MaskReader
from ditattn.runtime.run import Run
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.split import WHOLE, RankShare, SequenceSplit, TensorSplit
from ditattn.runtime.step import Step

if TYPE_CHECKING:
    from ditattn.runtime.stage import DenoisingStage

__all__ = ["Forward", "Look", "begin", "drop", "end", "running"]

Look = Callable[["Forward", Tensor, Tensor, Tensor], Tensor]


@dataclass
class Forward:
    """One running forward of a denoiser: what an attention call inside it can know.

    Attributes:
        run: that it belongs to.
        layer_batch: batch elements that the running layer got; None if unknown. A step cache may leave a branch out, below the root.
        split: how its tokens or weights are split between ranks; None if they are not.
        share: what this rank has of its calls.
        native: computes the running call by the host's own attention, `[B, S, H, D]`, for calls that run densely; None leaves them to us.
        dealt: metadata of calls before which the ranks of a ring deal out rows; None where they do not.
        look: in a dry run, sees every call and answers in its place.
    """

    stage: DenoisingStage
    run: Run
    model: ServedModel
    step: Step
    id: ForwardId
    layout: TokenLayout | None
    metadata: AttentionMetadata
    image_metadata: AttentionMetadata | None = None
    key_mask: Tensor | None = None
    layer: int | None = None
    layer_batch: int | None = None
    num_calls: int = 0
    split: SequenceSplit | TensorSplit | None = None
    share: RankShare = WHOLE
    native: Callable[[], Tensor] | None = None
    look: Look | None = None
    records: list[CallRecord] = field(default_factory=list)
    masks: MaskReader = field(default_factory=MaskReader)
    dealt: SparseAttentionMetadata | None = None

    @contextlib.contextmanager
    def dealing(self) -> Iterator[None]:
        """Calls of the block come after the deal."""
        assert self.dealt is not None
        own = self.share, self.metadata
        self.share, self.metadata = replace(self.share, rows=self.dealt.rows), self.dealt
        try:
            yield
        finally:
            self.share, self.metadata = own

    def metadata_of(self, layer: int | None) -> AttentionMetadata:
        """The metadata of a layer's calls: layers that see the image alone have no text tokens."""
        return self.image_metadata if self.image_metadata is not None and layer in self.model.image_layers else self.metadata


class _Running(threading.local):
    """The forwards of a thread that began and did not end, the innermost last."""

    def __init__(self) -> None:
        self.forwards: list[Forward] = []


_of_thread = _Running()


def running() -> Forward | None:
    """The denoiser forward that runs in this thread, or None."""
    forwards = _of_thread.forwards
    return forwards[-1] if forwards else None


def begin(forward: Forward) -> None:
    """Calls of this thread now belong to this forward, which may be one that runs already."""
    _of_thread.forwards = [*(other for other in _of_thread.forwards if other is not forward), forward]


def end(forward: Forward) -> None:
    """A forward of this thread ended, and with it all that began inside it."""
    for place, other in enumerate(_of_thread.forwards):
        if other is forward:
            del _of_thread.forwards[place:]
            return


def drop(ended: Callable[[Forward], bool]) -> list[Forward]:
    """Forget forwards of this thread that ended without a word; returns them."""
    found = [forward for forward in _of_thread.forwards if ended(forward)]
    _of_thread.forwards = [forward for forward in _of_thread.forwards if not ended(forward)]
    return found
