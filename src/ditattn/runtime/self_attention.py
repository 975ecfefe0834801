"""Which calls of a forward are self-attention, of which layer, and where their tokens stand: the rules of single calls."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ditattn.backends.base import AttentionMetadata
from ditattn.backends.sparse import SparseAttentionMetadata
from ditattn.errors import UnsupportedCall
from ditattn.ops.calls import DenseCall
from ditattn.runtime.forward import Forward
from ditattn.runtime.key_padding import VideoFirst
from ditattn.runtime.metadata import for_length, for_sample

__all__ = [
    "NOT_SELF_ATTENTION",
    "check_whole",
    "extra_queries",
    "in_model_order",
    "is_self_attention",
    "key_mask",
    "metadata_of_call",
    "next_layer",
    "video_first",
    "with_gathered_mask",
]

NOT_SELF_ATTENTION = "not self-attention of the denoiser"


def metadata_of_call(forward: Forward, layer: int | None, query: Tensor, key: Tensor) -> AttentionMetadata:
    """The metadata of a call that `next_layer` has counted: that of its layer, except where a family's calls differ."""
    family, metadata = forward.model.family, forward.metadata_of(layer)
    if query.shape[1] != key.shape[1]:
        return metadata
    if family.suffix_varies:
        metadata = for_length(metadata, key.shape[1])
    batch = _calls_per_layer(forward)
    if batch == 1:
        return metadata
    is_whole = forward.layer_batch in (None, batch)
    return for_sample(metadata, (forward.num_calls - 1) % batch if is_whole else None, batch)


def _calls_per_layer(forward: Forward) -> int:
    return forward.layout.raw_latent_shape[0] if forward.model.family.call_per_sample and forward.layout is not None else 1


def next_layer(forward: Forward, query: Tensor, key: Tensor) -> int | None:
    """Number of the layer whose call begins; None for a call that is not the denoiser's self-attention."""
    call = forward.num_calls
    if _has_its_own_keys(forward, query, key):
        forward.num_calls += 1
    else:
        # an adapter's cross-attention follows the self-attention of its layer
        call = max(call - 1, 0)
    counts = forward.layer is None and forward.model.layers_by_count
    return forward.model.layer_of_call(call // _calls_per_layer(forward)) if counts else forward.layer


def is_self_attention(forward: Forward, layer: int | None, query: Tensor, key: Tensor) -> bool:
    """False for cross-attention, also where it is an adapter's own inside a self-attention module: strictness is not about it."""
    return layer is not None and _has_its_own_keys(forward, query, key)


def _has_its_own_keys(forward: Forward, query: Tensor, key: Tensor) -> bool:
    """As many keys as queries; where a rank keeps its queries, those of all ranks; where the text is keys only, those of image and text."""
    if query.shape[1] == key.shape[1] or _are_queries_of_the_image(forward, query, key):
        return True
    rows = forward.share.rows
    return rows is not None and (query.shape[1], key.shape[1]) == (rows.num_tokens, sum(rows.gathered.streams))


def with_gathered_mask(forward: Forward, call: DenseCall) -> DenseCall:
    """A call of gathered keys whose mask is in the model's order, with the mask in theirs."""
    gathered, mask = forward.share.gathered, call.attn_mask
    if gathered is None or not gathered.interleaves or mask is None or mask.shape[-1] != call.key.shape[1]:
        return call
    return replace(call, attn_mask=mask.index_select(-1, gathered.tokens(mask.device)))


def in_model_order(forward: Forward, mask: Tensor, key: Tensor) -> Tensor:
    """A mask over gathered keys as one over the model's; others as they are."""
    if forward.share.gathered is None or not forward.share.interleaves or mask.shape[-1] != key.shape[1]:
        return mask
    return mask.index_select(-1, forward.share.gathered.places(mask.device))


def video_first(forward: Forward, mask: Tensor, call: DenseCall, metadata: AttentionMetadata) -> VideoFirst | None:
    """The order in which a call whose mask has gaps runs sparse; None where there is none. A rank's own queries have none."""
    if not isinstance(metadata, SparseAttentionMetadata) or call.causal or forward.share.rows is not None:
        return None
    moved = forward.masks.video_first(mask, call.key, metadata)
    if moved is None or forward.share.gathered is None:
        return moved
    return moved.of_gathered(forward.share.gathered)


def check_whole(forward: Forward, query: Tensor, key: Tensor) -> None:
    """Raise UnsupportedCall if a call of a split denoiser has as many keys as queries, and not all tokens: nobody gathered them."""
    if forward.share.gathered is None or query.shape[1] != key.shape[1]:
        return
    whole = sum(forward.share.gathered.streams)
    if query.shape[1] == whole:
        return
    found = f"{forward.model.name} is split between ranks, and a self-attention call has {query.shape[1]} of {whole} tokens"
    if query.shape[1] > whole:
        raise UnsupportedCall(f"{found}: the plan by which it is split leaves some of them whole on every rank")
    raise UnsupportedCall(f"{found}: its processor does not hand the host's parallel configuration on")


def _are_queries_of_the_image(forward: Forward, query: Tensor, key: Tensor) -> bool:
    """True where the text is keys only, and these are the image's queries with the keys of all tokens."""
    layout = forward.layout
    if layout is None or not forward.model.family.text_is_keys_only:
        return False
    text = layout.num_prefix_tokens + layout.num_suffix_tokens
    return query.shape[1] + text == key.shape[1] == layout.num_tokens


def extra_queries(forward: Forward, call: DenseCall) -> tuple[int, int]:
    """Tokens before and after the queries that are keys only."""
    if forward.layout is None or call.causal or not _are_queries_of_the_image(forward, call.query, call.key):
        return 0, 0
    return forward.layout.num_prefix_tokens, forward.layout.num_suffix_tokens


def key_mask(forward: Forward, mask: Tensor) -> Tensor:
    """The mask of a call by keys: models that make a square one of it know it by their forward's arguments."""
    is_square = mask.ndim == 4 and mask.shape[2] > 1
    return forward.key_mask if is_square and forward.key_mask is not None else mask
