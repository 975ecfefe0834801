"""Which tokens of a call are a video, and which are padding, from vllm-omni's AttentionMetadata."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditattn.backends.sparse import Reason
from ditattn.models import TokenLayout
from ditattn.plan.token_grids import TokenGrid
from ditattn.runtime.key_padding import OTHER_MASK
from ditattn.runtime.self_attention import NOT_SELF_ATTENTION

__all__ = ["Tokens"]


@dataclass(frozen=True)
class Tokens:
    """What the host says about the tokens of a call.

    Attributes:
        layout: of the first `used` tokens; None if unknown.
        used: tokens in front of the padding; None is all of them.
        why_dense: why the call is not for a sparse method, whatever the step.
    """

    layout: TokenLayout | None = None
    used: int | None = None
    why_dense: str | None = None

    @classmethod
    def of(cls, query: Tensor, key: Tensor, attn_metadata: Any, role: str = "self") -> Tokens:
        """From vllm-omni's AttentionMetadata, or None in its place."""
        if role == "cross" or query.shape[1] != key.shape[1]:
            return cls(why_dense=NOT_SELF_ATTENTION)
        video = getattr(attn_metadata, "video_layout", None)
        if video is None:
            # a mask over a sequence of unknown content may be anything
            masked = attn_metadata is not None and attn_metadata.attn_mask is not None
            return cls(why_dense=OTHER_MASK if masked else None)
        grids, used = _grids(video)
        if not grids:
            return cls(why_dense=Reason.UNKNOWN_GEOMETRY)
        mask = attn_metadata.attn_mask
        # with a layout published, a mask of the keys hides the padding behind the used tokens and nothing else
        if attn_metadata.full_attn_spans is not None or (mask is not None and (mask.ndim != 2 or mask.dtype != torch.bool)):
            return cls(why_dense=OTHER_MASK)
        told = [n for n in (video.used_len, *map(attn_metadata.extra.get, ("max_seqlen_q", "valid_kv_length"))) if isinstance(n, int)]
        # tokens behind the grid are padding only where somebody says so
        is_padded = bool(told) or mask is not None
        if used > query.shape[1] or any(number != used for number in told) or (used < query.shape[1] and not is_padded):
            return cls(why_dense=Reason.TOKEN_COUNT)
        return cls(TokenLayout.of_grids(query.shape[0], 1, grids, used), used)


def _grids(video: Any) -> tuple[list[TokenGrid], int]:
    """Grids of a VideoTokenLayout, the generated one first, and the number of tokens in front of the padding; no grids if it names none."""
    spans = sorted(video.video_spans, key=lambda span: (span.role != "target", span.start))
    grids = [TokenGrid(int(span.start), _size(span.latent_grid)) for span in spans]
    if not grids and video.latent_grid is not None:
        grids = [TokenGrid(int(video.prefix_len or 0), _size(video.latent_grid))]
    end = max((grid.stop for grid in grids), default=0)
    return grids, end if video.used_len is None else int(video.used_len)


def _size(grid: Any) -> tuple[int, int, int]:
    frames, rows, columns = map(int, grid)
    return frames, rows, columns
