"""DenoisingStage: knows, for every forward of every denoiser, the step, the branch and the tokens, and serves its attention calls.

Pure torch: how a host (diffusers) calls in here is the business of the host's adapter.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from ditattn.backends.base import AttentionBackend, AttentionImpl, AttentionMetadata, CallRecord
from ditattn.backends.config import AttentionConfig
from ditattn.backends.dense import DENSE_BACKEND
from ditattn.backends.sparse import EXPECTED_REASONS, SparseAttentionImpl, SparseAttentionMetadata
from ditattn.errors import DenseInStrictMode, UnsupportedCall
from ditattn.models import ModelFamily, TokenLayout
from ditattn.ops import dense_attention as dense_op
from ditattn.ops.calls import DenseCall
from ditattn.ops.contract import check_qkv, checked_scale, refuse_gradients
from ditattn.ops.table import choose
from ditattn.plan.reuse import ForwardId
from ditattn.runtime.arrangement import Arrangement
from ditattn.runtime.autocast import autocast_as_sdpa
from ditattn.runtime.branches import ForwardCounter
from ditattn.runtime.foreign_modes import native_sdpa, why_native
from ditattn.runtime.key_padding import MASK_WITH_GAPS, KeyPadding, MaskReader, VideoFirst, broadcastable
from ditattn.runtime.metadata import build_attn_metadata, for_forward, with_dealt_rows
from ditattn.runtime.report import AttentionReport, ComponentLog
from ditattn.runtime.run_share import KEYS, RunShare, holds_for_the_run
from ditattn.runtime.self_attention import (
    check_whole,
    extra_queries,
    in_model_order,
    is_self_attention,
    key_mask,
    metadata_of_call,
    next_layer,
    video_first,
    with_gathered_mask,
)
from ditattn.runtime.split import WHOLE, RankShare, SequenceSplit, TensorSplit, rank_share
from ditattn.runtime.step import Step, StepClock

__all__ = ["DenoisingStage", "Forward", "Look", "Probe", "ServedModel", "attend", "dry_run", "running"]

logger = logging.getLogger("ditattn")

NOT_SELF_ATTENTION = "not self-attention of the denoiser"
UNSAID = "the backend does not say what it ran"


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
    impls: dict[tuple[Any, ...], AttentionImpl] = field(default_factory=dict)

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


Look = Callable[["Forward", Tensor, Tensor, Tensor], Tensor]


@dataclass
class Forward:
    """One running forward of a denoiser: what an attention call inside it can know.

    Attributes:
        layer_batch: batch elements that the running layer got; None if unknown. A step cache may leave a branch out, below the root.
        split: how its tokens or weights are split between ranks; None if they are not.
        share: what this rank has of its calls.
        native: computes the running call by the host's own attention, `[B, S, H, D]`, for calls that run densely; None leaves them to us.
        dealt: metadata of calls before which the ranks of a ring deal out rows; None where they do not.
        look: in a dry run, sees every call and answers in its place.
    """

    stage: DenoisingStage
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


class Probe(Protocol):
    """Sees every self-attention call of a stage after it was served, and changes nothing."""

    def look(
        self,
        forward: Forward,
        layer: int | None,
        impl: AttentionImpl,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        metadata: AttentionMetadata,
        out: Tensor,
    ) -> None: ...


_local = threading.local()


def running() -> Forward | None:
    """The denoiser forward that runs in this thread, or None."""
    stack = getattr(_local, "stack", None)
    return stack[-1] if stack else None


@contextlib.contextmanager
def dry_run(model: ServedModel, look: Look) -> Iterator[None]:
    """Served attention calls of this thread are answered by `look`, which gets a forward that knows the layer, and query, key and value."""
    stack = getattr(_local, "stack", [])
    forward = Forward(DenoisingStage(StepClock()), model, Step(None, None, "none"), ForwardId(), None, AttentionMetadata(), look=look)
    _local.stack = [*stack, forward]
    try:
        yield
    finally:
        _local.stack = stack


class DenoisingStage:
    """The attention of one pipeline.

    Args:
        clock: tells the step of every forward.
        strict: raise DenseInStrictMode if a call falls back to dense attention for a reason that no setting asks for, or in every call of
            the run.

    Attributes:
        probe: sees every served call; None for none.
    """

    def __init__(self, clock: StepClock, strict: bool = False) -> None:
        self.clock = clock
        self.strict = strict
        self.models: list[ServedModel] = []
        self.not_served: dict[str, str] = {}
        self.probe: Probe | None = None
        self._metadata: dict[tuple[str, bool], tuple[tuple[Any, ...], AttentionMetadata]] = {}
        self._forwards = ForwardCounter()
        self._run_share = RunShare()

    def enter(
        self,
        model: ServedModel,
        arguments: Mapping[str, Any],
        cache_context: Any = None,
        branch: str | None = None,
        driver: Any = None,
        split: SequenceSplit | TensorSplit | None = None,
        share: RankShare | None = None,
    ) -> Forward:
        """A forward of `model` begins in this thread.

        Args:
            arguments: of the forward, by name.
            cache_context, branch, driver: see `StepClock.read`.
            split: how the host splits tokens or weights between ranks.
            share: what this rank has of the calls, where the host tells; None where it follows from `split` and the family.

        Raises:
            UnsupportedModel, UnsupportedCall: tokens that cannot be split so.
        """
        others = [other for other in getattr(_local, "stack", []) if other.model is not model]
        if len(others) < len(getattr(_local, "stack", [])):
            # KeyboardInterrupt ended a forward without a word, since torch calls no hook then: another run begins
            self._end_run()
        step = self.clock.read(cache_context, branch, model.family.time(arguments), driver)
        model.log.note_step(step.index, step.num_steps, step.source)
        if self._forwards.goes_back(step.index):
            self._forget_plans()
        forward_id = self._forwards.read(model.name, step.index, branch)
        layout = _layout(model, arguments)
        if layout is not None:
            model.log.note_grids([layout.grid, *(grid.size for grid in layout.further_grids)])
        share = rank_share(split, model.family, model.model_config, layout) if share is None else share
        metadata = self._metadata_of(model, step, layout, forward_id, share)
        forward = Forward(self, model, step, forward_id, layout, metadata, split=split, share=share)
        if model.image_layers and layout is not None:
            forward.image_metadata = self._metadata_of(model, step, layout.without_text(), forward_id, image_only=True)
        if share.rows is not None:
            impl_cls = model.backend.get_impl_cls()
            keeps = issubclass(impl_cls, SparseAttentionImpl) and impl_cls.keeps_first_frame_rows
            # some models take their tokens in lists
            values = chain.from_iterable(value if isinstance(value, list) else [value] for value in arguments.values())
            device_type = next(value.device.type for value in values if isinstance(value, Tensor))
            forward.dealt = with_dealt_rows(metadata, keeps, device_type)
        forward.key_mask = model.family.key_mask(model.model_config, arguments)
        model.log.split = "" if split is None else str(split)
        _local.stack = [*others, forward]
        return forward

    def set_tokens(self, forward: Forward, layout: TokenLayout | None, split: SequenceSplit | None, share: RankShare) -> None:
        """The next calls of a forward have these tokens, where a host knows of each call what it has. `share` is this rank's."""
        forward.layout, forward.split, forward.share = layout, split, share
        forward.metadata = self._metadata_of(forward.model, forward.step, layout, forward.id, share)
        if split is not None:
            forward.model.log.split = str(split)

    def leave(self, forward: Forward) -> None:
        """The forward ended, with or without an exception."""
        stack: list[Forward] = _local.stack
        if forward in stack:
            del stack[stack.index(forward) :]
        if forward.step.index is not None and forward.step.num_steps is not None and forward.step.index >= forward.step.num_steps - 1:
            # nobody tells when a run ends; what is left of the last step changes little
            self._warn_of_dense_run()

    def resume(self, forward: Forward) -> None:
        """Of the running forwards of this thread, calls now belong to this one."""
        _local.stack = [*(other for other in _local.stack if other is not forward), forward]

    def reset(self) -> None:
        """The run ended: the next forward is step 0."""
        _local.stack = [other for other in getattr(_local, "stack", []) if other.stage is not self]
        self._end_run()

    def _end_run(self) -> None:
        self.clock.reset()
        self._metadata.clear()
        self._forget_plans()

    def _warn_of_dense_run(self) -> None:
        self._run_share.warn((model.backend.name, model.config) for model in self.models if model.backend.is_sparse)

    def _forget_plans(self) -> None:
        self._warn_of_dense_run()
        self._run_share.forget()
        self._forwards.end_run()
        for model in self.models:
            for impl in model.impls.values():
                impl.end_run()

    def report(self) -> AttentionReport:
        """What ran so far."""
        return AttentionReport({model.name: model.log.report() for model in self.models}, dict(self.not_served))

    def _metadata_of(
        self,
        model: ServedModel,
        step: Step,
        layout: TokenLayout | None,
        forward_id: ForwardId,
        share: RankShare = WHOLE,
        image_only: bool = False,
    ) -> AttentionMetadata:
        """The metadata of a step, built once and shared by all layers and branches with the same tokens."""
        key, place = (step, layout, share), (model.name, image_only)
        cached = self._metadata.get(place)
        if cached is None or cached[0] != key:
            cached = self._metadata[place] = (key, build_attn_metadata(model.builder, model.config, *key))
        return for_forward(cached[1], forward_id)

    def attend(
        self,
        forward: Forward,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Serve one attention call of a running forward: `[B, S, H, D]` in and out."""
        model, layer = forward.model, next_layer(forward, query, key)
        call = _asked(query, key, value, attn_mask, is_causal, scale)
        with model.log.stopwatch.measure(query.device):
            out = self._serve(forward, layer, call)
        for record in forward.records:
            self._count(forward, layer, query, key, record)
        forward.records.clear()
        return out

    def count_native(self, forward: Forward, query: Tensor, key: Tensor, reason: str) -> None:
        """A call of a running forward was torch's own, for this reason.

        Raises:
            DenseInStrictMode: the installation is strict.
        """
        layer = next_layer(forward, query, key)
        if self.strict and is_self_attention(forward, layer, query, key):
            self._refuse(reason, forward)
        self._count(forward, layer, query, key, CallRecord(reason))

    def _count(self, forward: Forward, layer: int | None, query: Tensor, key: Tensor, record: CallRecord) -> None:
        forward.model.log.add(forward.step.index, layer, record)
        if forward.model.backend.is_sparse and is_self_attention(forward, layer, query, key):
            self._run_share.add(record)

    def _serve(self, forward: Forward, layer: int | None, call: DenseCall) -> Tensor:
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
                return self._serve_in_model_order(forward, layer, call, metadata, padding)
            metadata = metadata if padding is None else replace(metadata, **padding._asdict())
        extra = extra_queries(forward, call)
        if isinstance(metadata, SparseAttentionMetadata) and (moved is not None or (reason is None and any(extra))):
            arrangement = Arrangement(metadata if moved is None else moved.metadata, moved, extra)
            return self._serve_arranged(forward, layer, call, arrangement)
        if reason is not None:
            if self.strict and is_self_attention(forward, layer, query, key):
                self._refuse(reason, forward)
            forward.records.append(CallRecord(reason))
            return _as_the_host(forward, call)
        return self._run(forward, layer, call, metadata)

    def _serve_in_model_order(
        self, forward: Forward, layer: int | None, call: DenseCall, metadata: AttentionMetadata, padding: KeyPadding
    ) -> Tensor:
        """Leading keys are leading only in the model's order: a padded call that ranks have gathered is put in that order by copying."""
        gathered = forward.share.gathered
        assert gathered is not None
        if isinstance(metadata, SparseAttentionMetadata):
            metadata = replace(metadata, gathered=None)
        places = gathered.places(call.query.device)
        metadata = replace(metadata, **padding._asdict())
        call = replace(call, key=call.key.index_select(1, places), value=call.value.index_select(1, places))
        if forward.share.rows is not None:
            return self._run(forward, layer, call, metadata)
        out = self._run(forward, layer, replace(call, query=call.query.index_select(1, places)), metadata)
        return out.index_select(1, gathered.tokens(out.device))

    def _run(self, forward: Forward, layer: int | None, call: DenseCall, metadata: AttentionMetadata) -> Tensor:
        """By the layer's implementation, which the metadata tells everything else."""
        query, key, value = call.query, call.key, call.value
        strict = self.strict and is_self_attention(forward, layer, query, key)
        impl = self._impl(forward.model, layer, call, metadata)
        if strict and isinstance(impl, SparseAttentionImpl):
            assert isinstance(metadata, SparseAttentionMetadata)
            self._refuse(impl.why_dense(query, key, metadata), forward)
        if isinstance(impl, SparseAttentionImpl):
            impl.host_dense = forward.native
        out = impl.forward(query, key, value, metadata)
        if not forward.records:
            # an impl of another package that notes nothing is counted all the same
            reason = UNSAID if impl.is_sparse else DENSE_BACKEND
            if strict:
                self._refuse(reason, forward)
            forward.records.append(CallRecord(reason))
        if self.probe is not None:
            self.probe.look(forward, layer, impl, query, key, value, metadata, out)
        return out

    def _serve_arranged(self, forward: Forward, layer: int | None, call: DenseCall, arrangement: Arrangement) -> Tensor:
        """A call that a sparse method can serve in another arrangement: sparse in that one, or torch's own as the model asked it."""
        metadata = arrangement.metadata
        impl = self._impl(forward.model, layer, replace(call, attn_mask=None), metadata)
        assert isinstance(impl, SparseAttentionImpl)
        # arranged, there are as many queries as keys
        reason = impl.why_dense(call.key, call.key, metadata)
        if reason is not None:
            if self.strict and is_self_attention(forward, layer, call.query, call.key):
                self._refuse(reason, forward)
            out = _as_the_host(forward, call)
            if impl.learns(call.key, call.key, metadata, reason):
                arranged = arrangement.arranged(call)
                found = arrangement.arranged_output(out)
                forward.records.append(impl.learn(arranged.query, arranged.key, arranged.value, metadata, reason, found))
            else:
                forward.records.append(CallRecord(reason))
            return out
        arranged = arrangement.arranged(call)
        out = impl.forward(arranged.query, arranged.key, arranged.value, metadata)
        if self.probe is not None:
            self.probe.look(forward, layer, impl, arranged.query, arranged.key, arranged.value, metadata, out)
        return arrangement.answer(out)

    def _refuse(self, reason: str | None, forward: Forward) -> None:
        """Raise for a dense call that no setting asks for, or that shows that the whole run will be dense."""
        model, metadata = forward.model, forward.metadata
        if reason is None or not model.backend.is_sparse:
            return
        if reason not in EXPECTED_REASONS:
            raise DenseInStrictMode(f"{model.backend.name} on {model.name} would run densely in step {forward.step.index}: {reason}")
        if isinstance(metadata, SparseAttentionMetadata) and holds_for_the_run(reason, metadata, len(model.layers)):
            asked = f"{KEYS[reason]}={getattr(model.config, KEYS[reason])}"
            raise DenseInStrictMode(f"{model.backend.name} on {model.name} would run densely in every step: {reason} ({asked})")

    def _impl(self, model: ServedModel, layer: int | None, call: DenseCall, metadata: AttentionMetadata) -> AttentionImpl:
        """One implementation object per layer and call signature, made when first met."""
        _, _, heads, head_size = call.query.shape
        num_kv_heads = call.key.shape[2]
        signature = (layer, heads, head_size, num_kv_heads, call.causal, call.scale, metadata.key_lengths is not None)
        impl = model.impls.get(signature)
        if impl is None:
            prefix = model.layers[layer] if layer is not None and layer < len(model.layers) else ""
            make = model.backend.get_impl_cls()
            impl = make(heads, head_size, call.scale, call.causal, num_kv_heads, prefix, layer_index=layer, observer=_observe)
            impl.inside_op = True
            for op, row in impl.rows(call.query, call.key, call.value, metadata).items():
                model.log.note_implementation(op, row.name)
            model.impls[signature] = impl
        return impl


def _observe(record: CallRecord) -> None:
    forward = running()
    if forward is not None:
        forward.records.append(record)


def _layout(model: ServedModel, arguments: Mapping[str, Any]) -> TokenLayout | None:
    """An input form that the family does not know is no error here: the backend runs densely and counts "unknown geometry"."""
    try:
        return model.family.layout(model.model_config, arguments)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        logger.debug("%s: token layout unknown: %s", model.name, error)
        return None


def _asked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> DenseCall:
    """The call as the model made it, its mask among it."""
    if query.ndim != 4 or key.ndim != 4:
        check_qkv(query, key, value)
    return DenseCall(query, key, value, checked_scale(scale, query.shape[3]), is_causal, attn_mask=attn_mask)


def _as_the_host(forward: Forward, call: DenseCall) -> Tensor:
    return _native(call) if forward.native is None else forward.native()


def _native(call: DenseCall) -> Tensor:
    """What a call that is not ours to serve would have run without us: torch's SDPA."""
    check_qkv(call.query, call.key, call.value)
    if call.attn_mask is not None:
        call = replace(call, attn_mask=broadcastable(call.attn_mask))
    return dense_op.compute(call, choose(dense_op.TABLE, call.facts(), ("torch",)))


@torch.library.custom_op("ditattn::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    forward = running()
    if forward is None:
        _warn_stray()
        return _native(_asked(query, key, value, attn_mask, is_causal, scale))
    if forward.look is not None:
        return forward.look(forward, query, key, value)
    return forward.stage.attend(forward, query, key, value, attn_mask, is_causal, scale)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    return query.new_empty(query.shape)


_attend.register_autograd(refuse_gradients)


@torch.library.custom_op("ditattn::count_native", mutates_args=())
def _count_native(out: Tensor, query: Tensor, key: Tensor, reason: str) -> Tensor:
    """The output of a call that was torch's own, counted when it runs: a compiled graph runs no Python of ours."""
    forward = running()
    if forward is not None and forward.look is None:
        forward.stage.count_native(forward, query, key, reason)
    return out.clone()


@_count_native.register_fake
def _(out: Tensor, query: Tensor, key: Tensor, reason: str) -> Tensor:
    return torch.empty_like(out)


# the output passes through
_count_native.register_autograd(lambda context, gradient: (gradient, None, None, None))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of the denoiser forward that runs in this thread, `[B, S, H, D]` in and out, as one opaque operation for torch.compile.

    Step, branch, grid and layer are read inside the operation, so that a compiled graph stays right from step to step. Where a
    torch-function mode of somebody else is active (guidance that perturbs attention), the call is torch's SDPA, which that mode sees.

    Raises:
        UnsupportedCall: dropout, or a mask that is no tensor.
        DenseInStrictMode: see DenoisingStage.
    """
    if dropout_p:
        raise UnsupportedCall(f"attention dropout is for training; this package is forward only (got dropout_p={dropout_p})")
    if attn_mask is not None and not isinstance(attn_mask, Tensor):
        raise UnsupportedCall(f"a mask must be a tensor, not {type(attn_mask).__name__}")
    reason = why_native()
    if reason is not None:
        passed_on: Tensor = _count_native(native_sdpa(query, key, value, attn_mask, is_causal, scale), query, key, reason)
        return passed_on
    query, key, value, attn_mask = autocast_as_sdpa(query, key, value, attn_mask)
    out: Tensor = _attend(query, key, value, attn_mask, is_causal, scale)
    return out


def _warn_stray() -> None:
    if not getattr(_local, "warned_stray", False):
        _local.warned_stray = True
        logger.warning("attention was called outside a denoiser's forward: no step and no grid, so it runs densely and is not counted")
