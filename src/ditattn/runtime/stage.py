"""DenoisingStage: knows, for every forward of every denoiser, the step, the branch and the tokens, and counts its attention calls.

Pure torch: how a host (diffusers) calls in here is the business of the host's adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ditattn.backends.base import AttentionMetadata, CallRecord
from ditattn.models import TokenLayout
from ditattn.ops.calls import DenseCall
from ditattn.plan.reuse import ForwardId
from ditattn.runtime.dealing import attend_dealt, dealt_metadata, is_dealt, with_exchange
from ditattn.runtime.forward import Forward, begin, drop, end
from ditattn.runtime.metadata import build_attn_metadata, for_forward
from ditattn.runtime.native import asked
from ditattn.runtime.probe import Probe
from ditattn.runtime.report import AttentionReport
from ditattn.runtime.run import Run, Runs
from ditattn.runtime.self_attention import is_self_attention, next_layer
from ditattn.runtime.serve import serve
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.split import WHOLE, RankShare, SequenceSplit, TensorSplit, rank_share
from ditattn.runtime.step import Step, StepClock
from ditattn.runtime.strict import is_strict, refuse_dense

__all__ = ["DenoisingStage"]


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
        self.strict = strict
        self.models: list[ServedModel] = []
        self.not_served: dict[str, str] = {}
        self.probe: Probe | None = None
        self._runs = Runs(clock)

    def enter(
        self,
        model: ServedModel,
        arguments: Mapping[str, Any],
        cache_context: Any = None,
        branch: str | None = None,
        driver: Any = None,
        split: SequenceSplit | TensorSplit | None = None,
        share: RankShare | None = None,
        runner: object | None = None,
    ) -> Forward:
        """A forward of `model` begins in this thread.

        Args:
            arguments: of the forward, by name.
            cache_context, branch, driver: see `StepClock.read`.
            split: how the host splits tokens or weights between ranks.
            share: what this rank has of the calls, where the host tells; None where it follows from `split` and the family.
            runner: whose run it belongs to, where several may go on at a time: plans, orders and residuals of one are nothing to another.

        Raises:
            UnsupportedModel, UnsupportedCall: tokens that cannot be split so.
        """
        for stale in drop(lambda running: running.model is model):
            # KeyboardInterrupt ended it without a word, since torch calls no hook then: another run begins
            self._end(stale.run)
        run = self._runs.of(runner)
        step = run.clock.read(cache_context, branch, model.family.time(arguments), driver)
        model.log.note_step(step.index, step.num_steps, step.source)
        if run.forwards.goes_back(step.index):
            self._warn_of_dense(run)
            run.forget()
        forward_id = run.forwards.read(model.name, step.index, branch)
        layout = model.layout_of(arguments)
        if layout is not None:
            model.log.note_grids([layout.grid, *(grid.size for grid in layout.further_grids)])
        share = rank_share(split, model.family, model.model_config, layout) if share is None else share
        share = with_exchange(share, split, model.log)
        metadata = _metadata_of(run, model, step, layout, forward_id, share)
        forward = Forward(self, run, model, step, forward_id, layout, metadata, split=split, share=share)
        if model.image_layers and layout is not None:
            forward.image_metadata = _metadata_of(run, model, step, layout.without_text(), forward_id, image_only=True)
        forward.dealt = dealt_metadata(forward, arguments)
        forward.key_mask = model.family.key_mask(model.model_config, arguments)
        model.log.split = "" if split is None else str(split)
        begin(forward)
        return forward

    def set_tokens(self, forward: Forward, layout: TokenLayout | None, split: SequenceSplit | None, share: RankShare) -> None:
        """The next calls of a forward have these tokens, where a host knows of each call what it has. `share` is this rank's."""
        forward.layout, forward.split, forward.share = layout, split, share
        forward.metadata = _metadata_of(forward.run, forward.model, forward.step, layout, forward.id, share)
        if split is not None:
            forward.model.log.split = str(split)

    def leave(self, forward: Forward) -> None:
        """The forward ended, with or without an exception."""
        end(forward)
        if forward.step.index is not None and forward.step.num_steps is not None and forward.step.index >= forward.step.num_steps - 1:
            # nobody tells when a run ends; what is left of the last step changes little
            self._warn_of_dense(forward.run)

    def resume(self, forward: Forward) -> None:
        """Of the running forwards of this thread, calls now belong to this one."""
        begin(forward)

    def end_run(self, runner: object) -> None:
        """The run of `runner` ended: its next forward is step 0."""
        run = self._runs.of(runner)
        drop(lambda running: running.run is run)
        self._end(run)

    def reset(self) -> None:
        """Every run ended."""
        drop(lambda running: running.stage is self)
        for run in self._runs:
            self._end(run)

    def _end(self, run: Run) -> None:
        self._warn_of_dense(run)
        run.end()

    def _warn_of_dense(self, run: Run) -> None:
        run.share.warn((model.backend.name, model.config) for model in self.models if model.backend.is_sparse)

    def report(self) -> AttentionReport:
        """What ran so far."""
        return AttentionReport({model.name: model.log.report() for model in self.models}, dict(self.not_served))

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
        call = asked(query, key, value, attn_mask, is_causal, scale)
        if is_dealt(forward, query, key):
            return attend_dealt(forward, call, lambda dealt: self._served(forward, dealt))
        return self._served(forward, call)

    def _served(self, forward: Forward, call: DenseCall) -> Tensor:
        """A call of the queries that this rank computes, measured and counted."""
        query, key = call.query, call.key
        model, layer = forward.model, next_layer(forward, query, key)
        # a call that raised and is made again must not count twice
        forward.records.clear()
        with model.log.stopwatch.measure(query.device):
            out = serve(forward, layer, call)
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
        if is_strict(forward, layer, query, key):
            refuse_dense(forward, reason)
        self._count(forward, layer, query, key, CallRecord(reason))

    def _count(self, forward: Forward, layer: int | None, query: Tensor, key: Tensor, record: CallRecord) -> None:
        forward.model.log.add(forward.step.index, layer, record)
        if forward.model.backend.is_sparse and is_self_attention(forward, layer, query, key):
            forward.run.share.add(record)


def _metadata_of(
    run: Run,
    model: ServedModel,
    step: Step,
    layout: TokenLayout | None,
    forward_id: ForwardId,
    share: RankShare = WHOLE,
    image_only: bool = False,
) -> AttentionMetadata:
    """The metadata of a step, built once and shared by all layers and branches with the same tokens."""
    key, place = (step, layout, share), (model.name, image_only)
    cached = run.metadata.get(place)
    if cached is None or cached[0] != key:
        cached = run.metadata[place] = (key, build_attn_metadata(model.builder, model.config, *key))
    return for_forward(cached[1], forward_id)
