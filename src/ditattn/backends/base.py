"""The classes that every backend is made of, under the names that users of sglang, FastVideo and vLLM know.

A backend is four classes (backend, impl, metadata, builder); these bases supply every default, so that a backend's file holds only what
is particular to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ditattn.backends.config import AttentionConfig, DenseAttentionConfig
from ditattn.devices import Device
from ditattn.errors import UnsupportedHeadSize
from ditattn.ops import dense_attention as dense_op
from ditattn.ops.calls import Chosen, DenseCall
from ditattn.ops.contract import checked_scale
from ditattn.ops.table import Implementation, choose, named_head_dims
from ditattn.packages import Package
from ditattn.plan.block_deal import BlockDeal
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.token_order import TokenOrder

__all__ = [
    "AttentionBackend",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "CallRecord",
]


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """What a backend may know about one denoising step; built once per step and shared by all layers.

    Attributes:
        current_timestep: index of the denoising step, 0 first (not sigma, not t); None if unknown.
        key_lengths: int32 or int64 `[B]`: only that many leading key tokens of each batch element are real; None means all.
        known_key_lengths: the same numbers, where the host has read them anyway; None where only the device knows.

    Examples:
        The second clip of the batch has 200 real keys:

        >>> import ditattn, torch
        >>> metadata = ditattn.AttentionMetadata(current_timestep=3, key_lengths=torch.tensor([256, 200]))
        >>> metadata.current_timestep
        3
    """

    current_timestep: int | None = None
    key_lengths: Tensor | None = None
    known_key_lengths: tuple[int, ...] | None = None


class AttentionMetadataBuilder(ABC):
    """Makes the metadata of a step.

    Examples:
        >>> import ditattn, torch
        >>> backend = ditattn.get_attn_backend(64, torch.float32, pipeline_backend="torch_sdpa")
        >>> builder = backend.get_builder_cls()()
        >>> isinstance(builder, ditattn.AttentionMetadataBuilder), builder.build(current_timestep=3).current_timestep
        (True, 3)
    """

    def prepare(self) -> None:  # noqa: B027
        """Called once before a run; most builders have nothing to prepare."""

    @abstractmethod
    def build(self, *, current_timestep: int | None = None, **kwargs: Any) -> AttentionMetadata:
        """Metadata from the facts of a step."""


class DenseMetadataBuilder(AttentionMetadataBuilder):
    """Dense backends ask for nothing but the step; further facts are accepted, since the caller does not know who needs them."""

    def build(self, *, current_timestep: int | None = None, **kwargs: Any) -> AttentionMetadata:
        return AttentionMetadata(current_timestep=current_timestep)


@dataclass(frozen=True)
class CallRecord:
    """What one attention call really did.

    Attributes:
        reason: why it ran densely; None if it ran sparse.
        plan: the plan that ran; None if it ran densely.
        order: the order of the tokens that the plan speaks of; None is the model's own.
        reused: the plan was made by an earlier call.
        not_reused: why the call made a plan of its own although the configuration lets plans serve longer; None where it need not be said.
        query_order: the order of the queries, where a rank has some of them and everybody's keys; None is `order`. Where ranks deal out
            blocks of queries, `apply` exchanges, so that all of them must call it.
        own_blocks: then their blocks are not those of one process, and neither is the plan.
        token_orders: name of the order that was chosen for each key head; None where none was chosen since the last record.
        beside: a plan that ran beside the dense call, to learn how far the sparse steps after it would be off.
    """

    reason: str | None
    plan: BlockPlan | None = None
    order: TokenOrder | None = None
    reused: bool = False
    not_reused: str | None = None
    token_orders: tuple[str, ...] | None = None
    query_order: TokenOrder | BlockDeal | None = None
    own_blocks: bool = False
    beside: BlockPlan | None = None


class AttentionImpl(ABC):
    """The computation of one attention layer.

    Args:
        num_heads: query heads.
        head_size: D.
        softmax_scale: factor on the scores; None means 1 / sqrt(D).
        causal: query i sees keys 0..i.
        num_kv_heads: key and value heads; None means as many as query heads.
        prefix: the layer's path in the model, for messages.
        layer_index: number of the layer among the model's self-attention layers; None if unknown.
        observer: called once per `forward` with a CallRecord.

    Attributes:
        supported_head_sizes: possible head sizes; empty means any.
        is_sparse: it may drop key blocks.
        inside_op: who calls `forward` is one operation to torch already, so that implementations run without another one around them.

    Raises:
        UnsupportedHeadSize: the backend does not support `head_size`.

    Examples:
        >>> import ditattn, torch
        >>> backend = ditattn.get_attn_backend(64, torch.float32, pipeline_backend="torch_sdpa")
        >>> layer: ditattn.AttentionImpl = backend.get_impl_cls()(num_heads=4, head_size=64)
        >>> query, key, value = torch.randn(3, 1, 256, 4, 64)
        >>> layer.forward(query, key, value, ditattn.AttentionMetadata(current_timestep=0)).shape
        torch.Size([1, 256, 4, 64])
    """

    supported_head_sizes: ClassVar[tuple[int, ...]] = ()
    is_sparse: ClassVar[bool] = False
    inside_op: bool = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        *,
        layer_index: int | None = None,
        observer: Callable[[CallRecord], None] | None = None,
    ) -> None:
        check_head_size(type(self).__name__, head_size, self.supported_head_sizes)
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_size = head_size
        self.softmax_scale = head_size**-0.5 if softmax_scale is None else softmax_scale
        self.causal = causal
        self.prefix = prefix
        self.layer_index = layer_index
        self._observer = observer
        self._dense_rows = Chosen(dense_op.TABLE, choose)

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> Tensor:
        """query `[B, S, H, D]`, key and value `[B, T, G, D]` -> `[B, S, H, D]` in the query's dtype."""

    def rows(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> dict[str, Implementation]:
        """By op, the implementation that serves calls of this kind, for the report; one that makes no such choice knows none."""
        return {}

    def _dense(self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, names: tuple[str, ...] = ()) -> Tensor:
        """Every key of every query, by the first possible one of the named implementations, or of all."""
        if not self.inside_op:
            return dense_op.dense_attention(
                query, key, value, scale=self.softmax_scale, causal=self.causal, key_lengths=key_lengths, implementation=names
            )
        call = self._dense_call(query, key, value, key_lengths)
        return dense_op.compute(call, self._dense_rows.row(call, names))

    def _dense_call(self, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None) -> DenseCall:
        return DenseCall(query, key, value, checked_scale(self.softmax_scale, self.head_size), self.causal, key_lengths)

    def end_run(self) -> None:  # noqa: B027
        """A run ended: forget what was kept from its steps. Most implementations keep nothing."""

    def _note(self, record: CallRecord) -> None:
        if self._observer is not None:
            self._observer(record)


class AttentionBackend(ABC):
    """One method that users can name. Subclasses set the class attributes; the getters are the interface that hosts call.

    Attributes:
        name: what users type; the registry has it under the same name.
        impl_cls, metadata_cls, builder_cls, config_cls: its four classes.
        ops: the ops it is computed by, for `ditattn backends`.
        implementation: the implementation of its first op that it insists on; None takes the best one.
        dtypes: by device type, where it does not take fp32, bf16 and fp16 alike.
        packages: by device type, what it needs beyond torch and the device's own packages.
        any_of: by device type, packages of which it needs one.
        is_sparse, head_sizes: follow from `impl_cls`: it may drop key blocks; possible head sizes, empty means any.

    Examples:
        >>> import ditattn, torch
        >>> class DenseImpl(ditattn.AttentionImpl):
        ...     def forward(self, query, key, value, attn_metadata):
        ...         return ditattn.dense_attention(
        ...             query, key, value, scale=self.softmax_scale, causal=self.causal, key_lengths=attn_metadata.key_lengths
        ...         )
        >>> class DenseBackend(ditattn.AttentionBackend):
        ...     name = "my_dense_attn"
        ...     impl_cls = DenseImpl
        >>> DenseBackend.is_sparse
        False
    """

    name: ClassVar[str]
    impl_cls: ClassVar[type[AttentionImpl]]
    metadata_cls: ClassVar[type[AttentionMetadata]] = AttentionMetadata
    builder_cls: ClassVar[type[AttentionMetadataBuilder]] = DenseMetadataBuilder
    config_cls: ClassVar[type[AttentionConfig]] = DenseAttentionConfig
    ops: ClassVar[tuple[str, ...]] = ("dense_attention",)
    implementation: ClassVar[str | None] = None
    dtypes: ClassVar[Mapping[str, tuple[torch.dtype, ...]]] = {}
    packages: ClassVar[Mapping[str, tuple[Package, ...]]] = {}
    any_of: ClassVar[Mapping[str, tuple[Package, ...]]] = {}
    is_sparse: ClassVar[bool] = False
    head_sizes: ClassVar[tuple[int, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if hasattr(cls, "impl_cls"):
            cls.is_sparse, cls.head_sizes = cls.impl_cls.is_sparse, cls.impl_cls.supported_head_sizes

    @classmethod
    def why_not(cls, device: Device, head_size: int | None = None, dtype: torch.dtype | None = None) -> str | None:
        """Why it cannot run on `device` (for this head size and dtype, where given), or None."""
        reason = device.why_unavailable()
        if reason is not None:
            return reason
        needed = cls.packages.get(device.device_type, ())
        missing = [package.sentence() for package in needed if package.missing()]
        if missing:
            return "; ".join(missing)
        if head_size is not None and cls.head_sizes and head_size not in cls.head_sizes:
            return f"supports head sizes {named_head_dims(cls.head_sizes)}, not {head_size}"
        possible = cls.dtypes.get(device.device_type, (torch.float32, torch.bfloat16, torch.float16))
        if dtype is not None and dtype not in possible:
            return f"takes {', '.join(str(d).removeprefix('torch.') for d in possible)}, not {str(dtype).removeprefix('torch.')}"
        return None

    @classmethod
    def implementations_on(cls, device_type: str) -> tuple[str, ...]:
        """Implementations of its first op that it insists on there, in order of preference; empty where it takes the best one."""
        return () if cls.implementation is None else (cls.implementation,)

    @classmethod
    def get_enum(cls) -> Any:
        """Its member of `AttentionBackendEnum`."""
        from ditattn.backends.registry import AttentionBackendEnum

        return AttentionBackendEnum(cls.name)

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImpl]:
        return cls.impl_cls

    @classmethod
    def get_metadata_cls(cls) -> type[AttentionMetadata]:
        return cls.metadata_cls

    @classmethod
    def get_builder_cls(cls) -> type[AttentionMetadataBuilder]:
        return cls.builder_cls

    @classmethod
    def get_config_cls(cls) -> type[AttentionConfig]:
        return cls.config_cls

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Possible head sizes; empty means any."""
        return list(cls.head_sizes)


def check_head_size(who: str, head_size: int, supported: tuple[int, ...] | list[int]) -> None:
    """Raise UnsupportedHeadSize unless `head_size` is among `supported` (empty means any)."""
    if supported and head_size not in supported:
        raise UnsupportedHeadSize(f"{who} supports head sizes {named_head_dims(supported)}, not {head_size}")
