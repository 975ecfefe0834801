"""One attention call of a running forward: which tokens it is about, then the layer's implementation, or torch's own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch import Tensor

from ditattn.backends.base import AttentionImpl, AttentionMetadata, CallRecord
from ditattn.backends.dense import DENSE_BACKEND
from ditattn.backends.sparse import SparseAttentionImpl, SparseAttentionMetadata
from ditattn.ops.calls import DenseCall
from ditattn.runtime.arrangement import Arrangement
from ditattn.runtime.forward import Forward, running
from ditattn.runtime.key_padding import MASK_WITH_GAPS, KeyPadding, VideoFirst
from ditattn.runtime.native import native
from ditattn.runtime.self_attention import (
    NOT_SELF_ATTENTION,
    check_whole,
    extra_queries,
    in_model_order,
    key_mask,
    metadata_of_call,
    video_first,
    with_gathered_mask,
)
from ditattn.runtime.strict import is_strict, refuse_dense

__all__ = ["serve"]

UNSAID = "the backend does not say what it ran"


def serve(forward: Forward, layer: int | None, call: DenseCall) -> Tensor:
    """The output of a call, `[B, S, H, D]`; `forward.records` tell what ran. `layer` is None for other calls than self-attention."""
    query, key = call.query, call.key
    metadata = metadata_of_call(forward, layer, query, key)
    reason = NOT_SELF_ATTENTION if layer is None else None
    if reason is None:
        check_whole(forward, query, key)
    moved: VideoFirst | None = None
    if call.attn_mask is not None and forward.model.family.masks_stay_whole:
        call = with_gathered_mask(forward, call)
    if call.attn_mask is not None and reason is None:
        mask = key_mask(forward, in_model_order(forward, call.attn_mask, key))
        padding, reason = forward.masks.read(mask, key)
        if reason == MASK_WITH_GAPS:
            moved = video_first(forward, mask, call, metadata)
        if padding is not None and forward.share.interleaves:
            return _run_in_model_order(forward, layer, call, metadata, padding)
        metadata = metadata if padding is None else replace(metadata, **padding._asdict())
    extra = extra_queries(forward, call)
    if isinstance(metadata, SparseAttentionMetadata) and (moved is not None or (reason is None and any(extra))):
        arrangement = Arrangement(metadata if moved is None else moved.metadata, moved, extra)
        return _run_arranged(forward, layer, call, arrangement)
    if reason is None:
        return _run(forward, layer, call, metadata)
    if is_strict(forward, layer, query, key):
        refuse_dense(forward, reason)
    forward.records.append(CallRecord(reason))
    return _run_as_the_host(forward, call)


def _run_as_the_host(forward: Forward, call: DenseCall) -> Tensor:
    return native(call) if forward.native is None else forward.native()


def _run_in_model_order(forward: Forward, layer: int | None, call: DenseCall, metadata: AttentionMetadata, padding: KeyPadding) -> Tensor:
    """Leading keys are leading only in the model's order: a padded call that ranks have gathered is put in that order by copying."""
    gathered = forward.share.gathered
    assert gathered is not None
    if isinstance(metadata, SparseAttentionMetadata):
        metadata = replace(metadata, gathered=None)
    places = gathered.places(call.query.device)
    metadata = replace(metadata, **padding._asdict())
    call = replace(call, key=call.key.index_select(1, places), value=call.value.index_select(1, places))
    if forward.share.rows is not None:
        return _run(forward, layer, call, metadata)
    out = _run(forward, layer, replace(call, query=call.query.index_select(1, places)), metadata)
    return out.index_select(1, gathered.tokens(out.device))


def _run(forward: Forward, layer: int | None, call: DenseCall, metadata: AttentionMetadata) -> Tensor:
    """By the layer's implementation, which the metadata tells everything else."""
    query, key, value = call.query, call.key, call.value
    strict = is_strict(forward, layer, query, key)
    impl = _impl(forward, layer, call, metadata)
    if strict and isinstance(impl, SparseAttentionImpl):
        assert isinstance(metadata, SparseAttentionMetadata)
        refuse_dense(forward, impl.why_dense(query, key, metadata))
    with _dense_by_host(forward, impl):
        out = impl.forward(query, key, value, metadata)
    if not forward.records:
        # an impl of another package that notes nothing is counted all the same
        reason = UNSAID if impl.is_sparse else DENSE_BACKEND
        if strict:
            refuse_dense(forward, reason)
        forward.records.append(CallRecord(reason))
    if forward.stage.probe is not None:
        forward.stage.probe.look(forward, layer, impl, query, key, value, metadata, out)
    return out


def _dense_by_host(forward: Forward, impl: AttentionImpl) -> AbstractContextManager[None]:
    """Of hosts that have dense attention of their own: it computes what a sparse method runs densely."""
    if forward.native is None or not isinstance(impl, SparseAttentionImpl):
        return nullcontext()
    return impl.dense_by_host(forward.native)


def _run_arranged(forward: Forward, layer: int | None, call: DenseCall, arrangement: Arrangement) -> Tensor:
    """A call that a sparse method can serve in another arrangement: sparse in that one, or torch's own as the model asked it."""
    metadata = arrangement.metadata
    impl = _impl(forward, layer, replace(call, attn_mask=None), metadata)
    assert isinstance(impl, SparseAttentionImpl)
    # arranged, there are as many queries as keys
    reason = impl.why_dense(call.key, call.key, metadata)
    if reason is not None:
        return _run_densely(forward, layer, call, arrangement, impl, reason)
    arranged = arrangement.arranged(call)
    out = impl.forward(arranged.query, arranged.key, arranged.value, metadata)
    if forward.stage.probe is not None:
        forward.stage.probe.look(forward, layer, impl, arranged.query, arranged.key, arranged.value, metadata, out)
    return arrangement.answer(out)


def _run_densely(
    forward: Forward, layer: int | None, call: DenseCall, arrangement: Arrangement, impl: SparseAttentionImpl, reason: str
) -> Tensor:
    """Torch's own as the model asked it; the method may learn from it what it needs in its arrangement."""
    if is_strict(forward, layer, call.query, call.key):
        refuse_dense(forward, reason)
    out = _run_as_the_host(forward, call)
    if not impl.learns(call.key, call.key, arrangement.metadata, reason):
        forward.records.append(CallRecord(reason))
        return out
    arranged, found = arrangement.arranged(call), arrangement.arranged_output(out)
    forward.records.append(impl.learn(arranged.query, arranged.key, arranged.value, arrangement.metadata, reason, found))
    return out


def _impl(forward: Forward, layer: int | None, call: DenseCall, metadata: AttentionMetadata) -> AttentionImpl:
    """One implementation object per run, layer and call signature, made when first met."""
    model = forward.model
    _, _, heads, head_size = call.query.shape
    num_kv_heads = call.key.shape[2]
    signature = (model.name, layer, heads, head_size, num_kv_heads, call.causal, call.scale, metadata.key_lengths is not None)
    impl = forward.run.impls.get(signature)
    if impl is None:
        prefix = model.layers[layer] if layer is not None and layer < len(model.layers) else ""
        make = model.backend.get_impl_cls()
        impl = make(heads, head_size, call.scale, call.causal, num_kv_heads, prefix, layer_index=layer, observer=_observe)
        impl.inside_op = True
        for op, row in impl.rows(call.query, call.key, call.value, metadata).items():
            model.log.note_implementation(op, row.name)
        forward.run.impls[signature] = impl
    return impl


def _observe(record: CallRecord) -> None:
    forward = running()
    if forward is not None:
        forward.records.append(record)
