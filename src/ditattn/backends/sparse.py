"""What the sparse backends share: their metadata, when they run densely, and the sparse call path: reorder, plan, attend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditattn.backends.base import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, CallRecord
from ditattn.backends.config import AttentionConfig, SparseAttentionConfig, parse_layers, resolve_steps
from ditattn.errors import ConfigError, UnsupportedCall
from ditattn.ops import block_sparse_attention as sparse_op
from ditattn.ops.calls import Chosen, SparseCall
from ditattn.ops.contract import checked_scale
from ditattn.ops.pooled_tail import PooledTail
from ditattn.ops.table import Implementation, choose, choose_to_run
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan
from ditattn.plan.reuse import ForwardId, PlanMemory, ReusePolicy
from ditattn.plan.split import GatheredRows, GatheredTokens, HeadShare, RowOrder
from ditattn.plan.token_grids import TokenGrid
from ditattn.plan.token_order import TokenOrder, token_order

__all__ = [
    "Reason",
    "SparseAttentionBackend",
    "SparseAttentionImpl",
    "SparseAttentionMetadata",
    "SparseAttentionMetadataBuilder",
    "latent_grid",
    "why_not_this_step",
]

logger = logging.getLogger("ditattn")


class Reason:
    """Why a sparse backend ran a call densely. The words users read in reports."""

    SPARSITY_ZERO = "sparsity 0"
    STEP_UNKNOWN = "step unknown"
    FIRST_STEPS = "first steps"
    LAST_STEPS = "last steps"
    REFRESH = "refresh step"
    STEPS_UNKNOWN = "number of steps unknown"
    SKIPPED_LAYER = "skipped layer"
    LAYER_UNKNOWN = "layer unknown"
    SHORT = "short sequence"
    UNEQUAL_LENGTHS = "query and key lengths differ"
    UNKNOWN_GEOMETRY = "unknown geometry"
    TOKEN_COUNT = "token count does not match the grid"
    SPLIT_ELSEWHERE = "a part of the tokens alone: they are split between processes that are not known here"
    PADDED_VIDEO = "padding reaches into the video"


class NotReused:
    """Why a call that could have reused a plan by its configuration made one of its own. The words users read in reports."""

    STEP_UNKNOWN = "step unknown"
    UNKNOWN_PADDING = "key lengths known to the device only"


# conditions a user asked for; everything else makes strict=True raise
EXPECTED_REASONS = frozenset(
    {Reason.SPARSITY_ZERO, Reason.FIRST_STEPS, Reason.LAST_STEPS, Reason.REFRESH, Reason.SKIPPED_LAYER, Reason.SHORT}
)


@dataclass(frozen=True, kw_only=True)
class SparseAttentionMetadata(AttentionMetadata):
    """One step as a sparse backend sees it: its configuration, and the facts of the step.

    The keys of the configuration are attributes here too (`metadata.sparsity`); those that depend on the step are made ready for it.

    Attributes:
        config: as it was parsed and checked, once.
        num_steps: steps of the run; None if unknown.
        latent_shape: token grid (F, Y, X) of the video, after patchify; None if unknown.
        num_prefix_tokens, num_suffix_tokens: all tokens before and after the video tokens. In an order other than "raster" only those at
            the end, behind every grid, may be padding; that is checked where the host knows the key lengths.
        further_grids: references, conditions or layers among the prefix and suffix tokens; what is in no grid is kept whole.
        gathered: where the tokens stand that several ranks gathered; None where they stand in the model's order.
        rows: which tokens the queries are, where a rank keeps some and has everybody's keys; None where it has all.
        heads: which heads of the layer a call has, where ranks share them; None where it has all.
        forward_id: run and branch of the forward; None where the host does not say, or where nothing outlasts a step.

    Examples:
        >>> import ditattn
        >>> config = ditattn.SparseAttentionConfig(sparsity=0.5, skip_first_steps="20%")
        >>> metadata = ditattn.SparseAttentionMetadata(config=config, current_timestep=4, num_steps=30, latent_shape=(13, 16, 20))
        >>> metadata.sparsity, metadata.skip_first_steps
        (0.5, 6)
    """

    config: SparseAttentionConfig
    num_steps: int | None = None
    latent_shape: tuple[int, int, int] | None = None
    num_prefix_tokens: int = 0
    num_suffix_tokens: int = 0
    further_grids: tuple[TokenGrid, ...] = ()
    gathered: GatheredTokens | None = None
    rows: GatheredRows | None = None
    heads: HeadShare | None = None
    forward_id: ForwardId | None = None

    def __getattr__(self, key: str) -> Any:
        """A key of the configuration; kept, so that the layers that share this step find it as quickly as a field."""
        config = vars(self).get("config")
        if config is None or key not in type(config).model_fields:
            raise AttributeError(f"{type(self).__name__} has no attribute '{key}'")
        return vars(self).setdefault(key, getattr(config, key))

    @cached_property
    def skip_first_steps(self) -> int | None:
        """Steps before this index run densely; None for a share of an unknown number of steps."""
        return resolve_steps(self.config.skip_first_steps, self.num_steps)

    @cached_property
    def skip_last_steps(self) -> int | None:
        """That many last steps run densely; None as above."""
        return resolve_steps(self.config.skip_last_steps, self.num_steps)

    @cached_property
    def skip_layers(self) -> frozenset[int]:
        """Layers that run densely."""
        return parse_layers(self.config.skip_layers)

    @property
    def reuse(self) -> ReusePolicy:
        """How long plans serve."""
        return ReusePolicy(self.plan_refresh_steps, self.share_plan_between_branches)

    @property
    def num_tokens(self) -> int | None:
        """Length of the whole sequence; None if the grid is unknown."""
        if self.latent_shape is None:
            return None
        frames, rows, columns = self.latent_shape
        return self.num_prefix_tokens + frames * rows * columns + self.num_suffix_tokens

    def as_stored(self, order: TokenOrder, device: torch.device) -> TokenOrder:
        """An order of the model's tokens as one of the tokens as a call has them."""
        return order if self.gathered is None else self.gathered.ordered(order, device)

    @property
    def num_last_tokens(self) -> int:
        """Tokens behind every grid."""
        assert self.num_tokens is not None
        ends = [self.num_tokens - self.num_suffix_tokens, *(grid.stop for grid in self.further_grids)]
        return self.num_tokens - max(ends)

    @property
    def whole_first_frames(self) -> bool:
        """True if the first frame of every video is kept: a grid of one frame is an image."""
        assert self.latent_shape is not None
        return self.first_frame_sink and max(self.latent_shape[0], *(grid.size[0] for grid in self.further_grids), 1) > 1


def latent_grid(raw_latent_shape: Sequence[int], patch_size: int | Sequence[int]) -> tuple[int, int, int]:
    """Token grid (F, Y, X) from a latent shape `[..., T, H, W]` and the patch of the model: (t, h, w), or p for (1, p, p).

    Raises:
        ConfigError: fewer than three axes, or a grid without tokens.
    """
    patch = (1, patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if len(raw_latent_shape) < 3 or len(patch) != 3:
        raise ConfigError(f"need a latent shape [..., T, H, W] and a patch (t, h, w), not {tuple(raw_latent_shape)} and {patch_size}")
    frames, rows, columns = (size // p for size, p in zip(tuple(raw_latent_shape)[-3:], patch, strict=True))
    if min(frames, rows, columns) < 1:
        raise ConfigError(f"latent shape {tuple(raw_latent_shape)} is smaller than one patch {patch}")
    return frames, rows, columns


class SparseAttentionMetadataBuilder(AttentionMetadataBuilder):
    """Makes the metadata of a step. At sparsity 0 it warns once per process, not per step.

    Examples:
        >>> import ditattn
        >>> builder = ditattn.SparseAttentionMetadataBuilder()
        >>> metadata = builder.build(current_timestep=4, raw_latent_shape=(1, 16, 13, 32, 40), patch_size=(1, 2, 2), sparsity=0.5)
        >>> metadata.latent_shape
        (13, 16, 20)
    """

    metadata_cls: ClassVar[type[SparseAttentionMetadata]] = SparseAttentionMetadata
    config_cls: ClassVar[type[SparseAttentionConfig]] = SparseAttentionConfig

    warned_at_zero: ClassVar[bool] = False

    def build(
        self,
        *,
        current_timestep: int | None = None,
        raw_latent_shape: Sequence[int] | None = None,
        patch_size: int | Sequence[int] = 1,
        config: SparseAttentionConfig | None = None,
        **kwargs: Any,
    ) -> SparseAttentionMetadata:
        """Metadata of one step.

        Args:
            current_timestep: index of the step.
            raw_latent_shape: whole latent shape `[B, C, T, H, W]`; None if unknown, then every call runs densely.
            patch_size: patch of the model, (t, h, w) or p.
            config: the configuration, parsed. Callers without one give its keys instead, such as skip_first_steps=10, sparsity=0.2; then
                `min_tokens` is 0 unless given.
            kwargs: keys of the configuration, and further fields of the metadata class.

        Raises:
            ConfigError: a key outside its range; names the values of all keys.
        """
        if config is None:
            keys = {key: kwargs.pop(key) for key in list(kwargs) if key in self.config_cls.model_fields}
            config = self._parse({"min_tokens": 0, **keys})
        if config.sparsity == 0 and not SparseAttentionMetadataBuilder.warned_at_zero:
            SparseAttentionMetadataBuilder.warned_at_zero = True
            logger.warning("sparsity is 0: every block is kept, so every call runs densely")
        grid = None if raw_latent_shape is None else latent_grid(raw_latent_shape, patch_size)
        # a metadata class of another package may have fields for its keys, as sglang's have
        own = {one.name: getattr(config, one.name) for one in fields(self.metadata_cls) if one.name in type(config).model_fields}
        return self.metadata_cls(current_timestep=current_timestep, latent_shape=grid, config=config, **own, **kwargs)

    def _parse(self, keys: dict[str, Any]) -> SparseAttentionConfig:
        try:
            return self.config_cls.from_mapping(keys)
        except ConfigError as error:
            given = ", ".join(f"{key}={value}" for key, value in keys.items())
            raise type(error)(f"invalid attention metadata ({given}): {error}") from None


class SparseAttentionImpl(AttentionImpl):
    """schedule says dense -> dense attention; otherwise order -> plan, made or kept -> block-sparse attention in that order.

    Examples:
        A method writes `plan`. Here every block keeps the first half of the blocks, and those that are `protected`:

        >>> import ditattn, torch
        >>> class FirstHalfImpl(ditattn.SparseAttentionImpl):
        ...     def plan(self, query, key, attn_metadata, order, protected):
        ...         first = torch.arange(len(protected)) < len(protected) // 2
        ...         mask = first | protected | protected.unsqueeze(1)
        ...         return ditattn.BlockPlan.from_mask(mask[None, None], query.shape[1], key.shape[1])
        >>> layer = FirstHalfImpl(num_heads=2, head_size=64)
        >>> metadata = ditattn.SparseAttentionMetadataBuilder().build(
        ...     current_timestep=1, raw_latent_shape=(1, 16, 4, 32, 32), patch_size=(1, 2, 2), sparsity=0.5, skip_first_steps=1
        ... )
        >>> query, key, value = torch.randn(3, 1, 4 * 16 * 16, 2, 64)
        >>> layer.forward(query, key, value, metadata).shape
        torch.Size([1, 1024, 2, 64])
    """

    is_sparse = True

    # False where the rows of a first frame are chosen like others
    keeps_first_frame_rows: ClassVar[bool] = True
    # the backend's name, for the error
    not_causal: ClassVar[str | None] = None
    # of hosts that have dense attention of their own: computes the call that runs, if it runs densely; None leaves that to us
    host_dense: Callable[[], Tensor] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.causal and self.not_causal is not None:
            raise UnsupportedCall(f"{self.not_causal} does not support causal attention; block_sparse_attn does")
        self._plans = PlanMemory()
        self._sparse_rows = Chosen(sparse_op.TABLE, choose_to_run)
        self._known_tokens: tuple[object, TokenOrder, Tensor] | None = None
        self._known_rows: tuple[object, RowOrder] | None = None

    def end_run(self) -> None:
        self._plans.forget()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> Tensor:
        assert isinstance(attn_metadata, SparseAttentionMetadata)
        reason = self.why_dense(query, key, attn_metadata)
        if reason is None:
            out, record = self._attend(query, key, value, attn_metadata)
        else:
            out = self._dense(query, key, value, attn_metadata.key_lengths) if self.host_dense is None else self.host_dense()
            record = self.learn(query, key, value, attn_metadata, reason, out)
        self._note(record)
        return out

    def learns(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata, reason: str) -> bool:
        """True if `learn` looks at the tensors of this call, which runs densely for `reason`."""
        return False

    def learn(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, reason: str, out: Tensor) -> CallRecord:
        """What a dense call with the output `out` tells the sparse calls after it; returns the record of the call."""
        return CallRecord(reason)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata) -> tuple[Tensor, CallRecord]:
        """A call that runs sparse: order, plan, kernel."""
        order, protected = self._tokens(metadata, query.device)
        self._check_order(metadata)
        if metadata.rows is not None:
            return self._attend_rows(query, key, value, metadata, order, protected)
        record = self._planned(query, key, metadata, lambda: self.plan(query, key, metadata, order, protected))
        assert record.plan is not None
        return self._sparse(query, key, value, record.plan, metadata.key_lengths, order), replace(record, order=order)

    def _attend_rows(
        self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, order: TokenOrder, protected: Tensor
    ) -> tuple[Tensor, CallRecord]:
        """A rank's queries and everybody's keys: each stands in an order of its own, by copying."""
        rows = self._row_order(metadata, query.device)
        q, k, v = rows.order.apply(query), order.apply(key), order.apply(value)
        as_they_stand = replace(order, forward=None, inverse=None)
        whole = rows.order.protected_blocks(BLOCK_SIZE, metadata.whole_first_frames, query.device)

        def plan() -> BlockPlan:
            made = self.plan(q, k, metadata, as_they_stand, protected)
            # methods keep whole rows where there are as many queries as keys
            return BlockPlan.from_mask(made.to_mask() | whole.unsqueeze(-1), made.query_length, made.key_length)

        record = self._planned(q, k, metadata, plan)
        assert record.plan is not None
        out = rows.order.undo(self._sparse(q, k, v, record.plan, metadata.key_lengths, as_they_stand))
        return out, replace(record, order=order, query_order=rows.order, own_blocks=rows.own_blocks)

    def rows(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> dict[str, Implementation]:
        call = self._dense_call(query, key, value, attn_metadata.key_lengths)
        assert isinstance(attn_metadata, SparseAttentionMetadata)
        # the facts of a sparse call that returns no log-sum-exp; whether the choice deserves a warning shows when one runs
        facts = replace(call.facts(), needs=call.facts().needs | self.more_needs(attn_metadata))
        return {"block_sparse_attention": choose(sparse_op.TABLE, facts), "dense_attention": self._dense_rows.row(call)}

    def more_needs(self, metadata: SparseAttentionMetadata) -> frozenset[str]:
        """What the method's sparse calls ask of an implementation beside what the tensors tell (`CallFacts.needs`)."""
        return frozenset()

    def _sparse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: BlockPlan,
        key_lengths: Tensor | None,
        order: TokenOrder,
        tail: PooledTail | None = None,
    ) -> Tensor:
        if not self.inside_op:
            return sparse_op.block_sparse_attention(
                query, key, value, plan, scale=self.softmax_scale, causal=self.causal, key_lengths=key_lengths, order=order, tail=tail
            )
        scale = checked_scale(self.softmax_scale, self.head_size)
        call = SparseCall(query, key, value, plan, scale, self.causal, key_lengths, False, order.forward, order.inverse, tail)
        row = self._sparse_rows.row(call)
        sparse_op.check_plan(query, key, plan)
        if tail is not None:
            sparse_op.check_tail(key, plan, tail, self.causal)
        return sparse_op.compute(call, row)[0]

    def _tokens(self, metadata: SparseAttentionMetadata, device: torch.device) -> tuple[TokenOrder, Tensor]:
        """The order of the tokens, and bool `[N]`, which of its blocks every plan keeps. Both serve until the tokens change."""
        grid = metadata.latent_shape
        assert grid is not None
        facts = (metadata.token_order, grid, metadata.num_prefix_tokens, metadata.num_suffix_tokens, device, metadata.further_grids)
        whole_first_frame = metadata.whole_first_frames
        known = (facts, whole_first_frame, metadata.gathered)
        if self._known_tokens is None or self._known_tokens[0] != known:
            order = metadata.as_stored(token_order(*facts), device)
            self._known_tokens = (known, order, order.protected_blocks(BLOCK_SIZE, whole_first_frame, device))
        return self._known_tokens[1:]

    def _row_order(self, metadata: SparseAttentionMetadata, device: torch.device) -> RowOrder:
        """How this rank's queries stand in the order of all tokens. Serves until the tokens change."""
        assert metadata.rows is not None
        assert metadata.latent_shape is not None
        facts = (metadata.token_order, metadata.latent_shape, metadata.num_prefix_tokens, metadata.num_suffix_tokens, "cpu")
        known = (facts, metadata.further_grids, metadata.rows, device)
        if self._known_rows is None or self._known_rows[0] != known:
            self._known_rows = (known, metadata.rows.ordered(token_order(*facts, metadata.further_grids), device))
        return self._known_rows[1]

    def _planned(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata, plan: Callable[[], BlockPlan]) -> CallRecord:
        """The call with its plan: a kept one where the metadata lets one serve, else a new one."""
        step, policy = metadata.current_timestep, metadata.reuse
        if not policy.reuses:
            return CallRecord(None, plan())
        unknown_padding = metadata.key_lengths is not None and metadata.known_key_lengths is None
        if step is None or unknown_padding:
            # asking the device whether two steps or branches pad alike would wait for it in every layer
            why = NotReused.STEP_UNKNOWN if step is None else NotReused.UNKNOWN_PADDING
            return CallRecord(None, plan(), not_reused=why)
        facts, forward_id = _plan_facts(query, key, metadata), metadata.forward_id or ForwardId()
        kept = self._plans.find(step, forward_id, facts, policy)
        if kept is not None:
            return CallRecord(None, kept, reused=True)
        made = plan()
        self._plans.keep(made, step, forward_id, facts, policy)
        return CallRecord(None, made)

    def plan(self, query: Tensor, key: Tensor, attn_metadata: SparseAttentionMetadata, order: TokenOrder, protected: Tensor) -> BlockPlan:
        """Which blocks of `order` to keep; query and key are in the model's order. `protected` is bool `[N]`.

        Every method writes this one, or `_attend` where it needs more than queries and keys in one order.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which blocks to keep")

    def why_dense(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> str | None:
        """The reason why this call runs densely, one of `Reason`; None if it runs sparse."""
        if self.keeps_everything(metadata):
            return Reason.SPARSITY_ZERO
        return why_not_this_step(metadata) or self._why_never(query, key, metadata)

    def _why_never(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> str | None:
        """The reason why this call would run densely in every step."""
        if metadata.skip_layers and self.layer_index is None:
            return Reason.LAYER_UNKNOWN
        if self.layer_index in metadata.skip_layers:
            return Reason.SKIPPED_LAYER
        return _why_not_these_tokens(query.shape[1], key.shape[1], metadata, query.device.type)

    def keeps_everything(self, metadata: SparseAttentionMetadata) -> bool:
        """True if the settings can drop no block at all."""
        return metadata.sparsity == 0

    def _check_order(self, metadata: SparseAttentionMetadata) -> None:
        if self.causal and metadata.token_order != "raster":
            raise ConfigError("causal attention needs token_order='raster': in tile order the tokens before a token are not its past")


class SparseAttentionBackend(AttentionBackend):
    """Base of the sparse methods: a subclass sets `name`, `impl_cls`, and what it does not share.

    Examples:
        >>> import ditattn, torch
        >>> class EverythingImpl(ditattn.SparseAttentionImpl):
        ...     def plan(self, query, key, attn_metadata, order, protected):
        ...         return ditattn.BlockPlan.full(query.shape[1], key.shape[1], device=query.device)
        >>> class EverythingBackend(ditattn.SparseAttentionBackend):
        ...     name = "everything_attn"
        ...     impl_cls = EverythingImpl
        >>> EverythingBackend.is_sparse, EverythingBackend.get_supported_head_sizes()
        (True, [])
    """

    metadata_cls: ClassVar[type[AttentionMetadata]] = SparseAttentionMetadata
    builder_cls: ClassVar[type[AttentionMetadataBuilder]] = SparseAttentionMetadataBuilder
    config_cls: ClassVar[type[AttentionConfig]] = SparseAttentionConfig
    ops: ClassVar[tuple[str, ...]] = ("block_sparse_attention", "dense_attention")


def _plan_facts(query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> object:
    """What a plan depends on besides the values of its tokens; the metadata brings the fields that a backend adds."""
    timeless = replace(metadata, current_timestep=None, key_lengths=None, forward_id=None)
    return (timeless, query.shape, key.shape, query.dtype, query.device)


def why_not_this_step(metadata: SparseAttentionMetadata) -> str | None:
    """Why every call of this step runs densely, one of `Reason`; None if some run sparse."""
    step, first, last = metadata.current_timestep, metadata.skip_first_steps, metadata.skip_last_steps
    if first is None or last is None or (last and metadata.num_steps is None):
        return Reason.STEPS_UNKNOWN
    if step is None:
        return Reason.STEP_UNKNOWN if first or last else None
    if step < first:
        return Reason.FIRST_STEPS
    if metadata.num_steps is not None and last and step >= metadata.num_steps - last:
        return Reason.LAST_STEPS
    return None


def _has_partners() -> bool:
    """True in one of several processes that torch.distributed has brought together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _why_not_these_tokens(query_tokens: int, key_tokens: int, metadata: SparseAttentionMetadata, device_type: str) -> str | None:
    if query_tokens != (key_tokens if metadata.rows is None else metadata.rows.num_tokens):
        return Reason.UNEQUAL_LENGTHS
    if key_tokens < metadata.config.least_tokens(device_type):
        return Reason.SHORT
    if metadata.num_tokens is None:
        return Reason.UNKNOWN_GEOMETRY
    if key_tokens != metadata.num_tokens:
        return Reason.SPLIT_ELSEWHERE if key_tokens < metadata.num_tokens and _has_partners() else Reason.TOKEN_COUNT
    # another order puts the grids first and their tokens elsewhere: the leading keys of the model's order are then not the leading ones
    first_free = key_tokens - metadata.num_last_tokens
    if metadata.token_order != "raster" and min(metadata.known_key_lengths or (key_tokens,)) < first_free:
        return Reason.PADDED_VIDEO
    return None
