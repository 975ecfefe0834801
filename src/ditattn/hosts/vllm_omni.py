"""vllm-omni: one of our sparse backends where its diffusion attention is asked for RAINFUSION_ATTN.

vllm-omni calls `register` in each of its processes, by the entry point group `vllm_omni.general_plugins`. It does nothing unless the
environment asks for it. `vllm_omni` is imported inside functions alone. Source: vllm_omni 0.30.0, diffusion/attention.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from ditattn.backends.base import AttentionBackend, AttentionMetadata, CallRecord
from ditattn.backends.config import SparseAttentionConfig
from ditattn.backends.registry import RECOMMENDED_BACKEND, load_backend, usable_backends
from ditattn.backends.sparse import Reason, SparseAttentionImpl, SparseAttentionMetadata
from ditattn.devices import find_device
from ditattn.errors import BackendUnavailable, ConfigError, UnknownBackend, UnsupportedCall
from ditattn.models import TokenLayout
from ditattn.plan.token_grids import TokenGrid
from ditattn.runtime.key_padding import OTHER_MASK
from ditattn.runtime.metadata import build_attn_metadata
from ditattn.runtime.report import ComponentLog
from ditattn.runtime.run_share import RunShare
from ditattn.runtime.self_attention import NOT_SELF_ATTENTION
from ditattn.runtime.step import Step
from ditattn.values import KnownKeys, parse_config

__all__ = ["BlockSparseKeys", "Layer", "Run", "Tokens", "register"]

SWITCH = "DITATTN_VLLM_OMNI"
KEYS = "DITATTN_VLLM_OMNI_CONFIG"
SLOT = "RAINFUSION_ATTN"
CLASS_NAME = "DitattnBackend"

# below vllm_omni's root, so that vLLM's handlers print its lines
logger = logging.getLogger("vllm_omni.plugins.ditattn")

# keys of ours that block_sparse of vllm-omni says
SAID_BY_THE_HOST = {
    "sparsity": "sparsity",
    "preset": "sparsity and block_sparse.start_step",
    "skip_first_steps": "start_step",
    "skip_last_steps": "end_step",
    "skip_layers": "skip_layers",
}
# the host does not say which request a forward belongs to, so a kept plan or residual might be another video's
NEEDS_THE_REQUEST = ("plan_refresh_steps", "share_plan_between_branches", "residual")


class BlockSparseKeys(KnownKeys):
    """What vllm-omni's `block_sparse` hands to the attention of a layer, under its own names and defaults.

    Attributes:
        sparsity: share of key blocks to drop.
        start_step: that many first steps run densely.
        end_step: that many last steps run densely.
        precision: of the kernel; ours compute in the tensors' own type, which is "bf16" there.
        skip_layers: transformer blocks that run densely.
    """

    sparsity: float = 0.0
    start_step: int = Field(0, ge=0)
    end_step: int = Field(0, ge=0)
    precision: str = "bf16"
    skip_layers: tuple[int, ...] = ()

    @field_validator("precision")
    @classmethod
    def _check_precision(cls, value: str) -> str:
        if value != "bf16":
            raise ValueError("that is a kernel of MindIE-SD on Ascend; ditattn computes in the tensors' own type, so leave it at 'bf16'")
        return value

    def ours(self) -> dict[str, Any]:
        """The same under our names."""
        return {
            "sparsity": self.sparsity,
            "skip_first_steps": self.start_step,
            "skip_last_steps": self.end_step,
            "skip_layers": self.skip_layers,
        }


def asked_backend(environment: Mapping[str, str]) -> type[AttentionBackend] | None:
    """The backend that the environment asks for; None if it asks for none.

    Raises:
        UnknownBackend: no backend of that name, or one that is dense: the place that it would take is that of a sparse one.
    """
    value = environment.get(SWITCH, "").strip()
    if value in ("", "0"):
        return None
    try:
        backend = load_backend(RECOMMENDED_BACKEND if value == "1" else value)
    except UnknownBackend as error:
        raise UnknownBackend(f"{SWITCH}={value}: {error}; 1 takes {RECOMMENDED_BACKEND}, 0 none") from None
    if not _is_served(backend):
        names = ", ".join(one.name for one in usable_backends() if _is_served(one))
        raise UnknownBackend(f"{SWITCH}={value}: {SLOT} is vllm-omni's name for a sparse backend with blocks; take one of {names}")
    return backend


def _is_served(backend: type[AttentionBackend]) -> bool:
    return issubclass(backend.get_impl_cls(), SparseAttentionImpl)


def further_keys(environment: Mapping[str, str]) -> dict[str, Any]:
    """Keys of the backend that vllm-omni has no words for.

    Raises:
        ConfigError: a text that cannot be read, a key that `block_sparse` says, or one that asks for what this host does not tell.
    """
    keys = parse_config(environment.get(KEYS, ""))
    for key in keys:
        if key in SAID_BY_THE_HOST:
            raise ConfigError(f"{KEYS}: say {key} in vllm-omni's attention config, as block_sparse.{SAID_BY_THE_HOST[key]}")
        if key in NEEDS_THE_REQUEST and keys[key] is not False:
            raise ConfigError(f"{KEYS}: {key} cannot be honoured: vllm-omni does not say which request a forward belongs to")
    return keys


def config_of(backend: type[AttentionBackend], backend_kwargs: Mapping[str, Any] | None, keys: Mapping[str, Any]) -> SparseAttentionConfig:
    """The configuration of a layer from vllm-omni's keys and further ones of ours.

    Raises:
        UnknownKey, ConfigError: a key that neither has, or a value that cannot be honoured.
    """
    try:
        given = BlockSparseKeys.from_mapping(backend_kwargs or {})
    except ConfigError as error:
        raise type(error)(f"block_sparse: {error}") from None
    config = backend.get_config_cls().from_mapping({**keys, **given.ours()})
    assert isinstance(config, SparseAttentionConfig)
    return config


def layer_number(prefix: str) -> int | None:
    """The one number in a layer's path; None if there is none, or several."""
    numbers = [int(part) for part in prefix.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else None


def check_parallel(parallel_config: Any) -> None:
    """Raise UnsupportedCall where a rank would see some of the keys alone. Ulysses shows it all of them, for some heads."""
    for key, name in (("ring_degree", "ring attention"), ("allgather_degree", "AllGather-KV")):
        degree = getattr(parallel_config, key, 1)
        if degree > 1:
            raise UnsupportedCall(
                f"{SLOT}, served by ditattn, needs every key of the sequence to choose blocks, and {name} ({key}={degree}) splits them; "
                f"use Ulysses (ulysses_degree) and {key}=1"
            )


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


class Run:
    """What the layers of this process do, from one run of a model's denoising loop to the next: counted, and logged when a run ends."""

    def __init__(self) -> None:
        self.number = 0
        self._share = RunShare()
        self._log: ComponentLog | None = None
        self._configs: dict[SparseAttentionConfig, str] = {}
        self._first_step: int | None = None
        self._last_step: int | None = None

    def enter(self, step: Step) -> None:
        """A call of this step begins. A run has begun where the step goes back to the first one or before it."""
        if step.index is None:
            return
        if self._first_step is not None and self._last_step is not None and step.index <= self._first_step and step.index < self._last_step:
            self.finish()
        self._first_step = step.index if self._first_step is None else self._first_step
        self._last_step = step.index

    def add(self, layer: Layer, step: Step, record: CallRecord) -> None:
        """Count a call."""
        log = self.log_of(layer)
        if step.index is not None and step.index not in log.steps:
            log.note_step(step.index, step.num_steps, step.source)
        log.add(step.index, layer.number, record)
        self._share.add(record)

    def log_of(self, layer: Layer) -> ComponentLog:
        """Of all layers; a run has one backend."""
        if self._log is None:
            self._log = ComponentLog(SLOT, layer.backend.name, layer.config.model_dump())
        self._configs[layer.config] = layer.backend.name
        return self._log

    def finish(self) -> None:
        """The run ended: log what ran, and forget it."""
        if self._log is not None:
            logger.info("ditattn: %s", self._log.report().sentence())
            self._share.warn((name, config) for config, name in self._configs.items())
        self.number += 1
        self._share.forget()
        self._log, self._first_step, self._last_step = None, None, None
        self._configs.clear()


class Layer:
    """One attention layer of the host, served by a sparse backend of ours. It knows no class of vllm-omni's.

    Args:
        run: what all layers of the process share.
        num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix: as of `ditattn.AttentionImpl`.

    Attributes:
        number: in `prefix`; None if unknown.

    Raises:
        UnsupportedHeadSize, UnsupportedCall: what the backend does not take.
    """

    def __init__(
        self,
        backend: type[AttentionBackend],
        config: SparseAttentionConfig,
        run: Run,
        *,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
    ) -> None:
        self.backend, self.config, self.number = backend, config, layer_number(prefix)
        self._run, self._run_number = run, run.number
        self._records: list[CallRecord] = []
        make = backend.get_impl_cls()
        impl = make(
            num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, layer_index=self.number, observer=self._records.append
        )
        assert isinstance(impl, SparseAttentionImpl)
        impl.inside_op = True
        self._impl = impl
        self._builder = backend.get_builder_cls()()
        self._builder.prepare()
        self._known: tuple[object, AttentionMetadata] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, step: Step, dense: Callable[[], Tensor]) -> Tensor:
        """One call: `[B, S, H, D]` in and out; rows of padding are zero where it ran sparse.

        Args:
            dense: computes the same call by the host's own dense attention.

        Raises:
            UnsupportedCall: the last steps are to run densely, and the host does not say how many steps there are.
        """
        if tokens.why_dense == NOT_SELF_ATTENTION:
            # reports are about self-attention
            return dense()
        self._records.clear()
        self._run.enter(step)
        if self._run_number != self._run.number:
            self._run_number = self._run.number
            self._impl.end_run()
        with self._run.log_of(self).stopwatch.measure(query.device):
            out = self._attend(query, key, value, tokens, step, dense)
        for record in self._records:
            self._run.add(self, step, record)
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, step: Step, dense: Callable[[], Tensor]) -> Tensor:
        if tokens.why_dense is not None:
            self._records.append(CallRecord(tokens.why_dense))
            return dense()
        if self.config.skip_last_steps and step.index is not None and step.num_steps is None:
            raise UnsupportedCall(
                f"block_sparse.end_step={self.config.skip_last_steps} was asked for, and the pipeline does not say how many steps it runs "
                "(total_denoise_steps): leave end_step at 0"
            )
        metadata = self._metadata(step, tokens.layout)
        length, used = query.shape[1], query.shape[1] if tokens.used is None else tokens.used
        q, k, v = (query, key, value) if used == length else (x[:, :used] for x in (query, key, value))
        self._impl.host_dense = lambda: dense()[:, :used]
        try:
            out = self._impl.forward(q, k, v, metadata)
        finally:
            # it holds the tensors of this call
            self._impl.host_dense = None
        if self._records[-1].reason is None:
            self._note_sparse(q, k, v, metadata)
        return out if used == length else torch.cat([out, out.new_zeros(out.shape[0], length - used, *out.shape[2:])], dim=1)

    def _metadata(self, step: Step, layout: TokenLayout | None) -> SparseAttentionMetadata:
        known = (step, layout)
        if self._known is None or self._known[0] != known:
            self._known = (known, build_attn_metadata(self._builder, self.config, step, layout))
        metadata = self._known[1]
        assert isinstance(metadata, SparseAttentionMetadata)
        return metadata

    def _note_sparse(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata) -> None:
        """The first sparse call of a run says who computes it."""
        log = self._run.log_of(self)
        if log.implementations:
            return
        for op, row in self._impl.rows(query, key, value, metadata).items():
            log.note_implementation(op, row.name)
        assert metadata.latent_shape is not None
        logger.info(
            "ditattn: %s is sparse from step %s, layer %s on: %s tokens, %s",
            self.backend.name,
            metadata.current_timestep,
            self.number,
            " x ".join(map(str, metadata.latent_shape)),
            ", ".join(sorted(log.implementations["block_sparse_attention"])),
        )


RUN = Run()


def register() -> None:
    """Put a backend of ours in the place of RAINFUSION_ATTN in this process, if the environment asks for it. May be called again.

    `DITATTN_VLLM_OMNI` is a sparse backend's name, or 1 for the recommended one; `DITATTN_VLLM_OMNI_CONFIG` holds keys of it that
    vllm-omni has no words for.

    Raises:
        UnknownBackend, ConfigError: what the environment asks for does not exist or cannot be honoured.
        BackendUnavailable: a vllm-omni without that name, or with another plug-in in its place.
    """
    backend = asked_backend(os.environ)
    if backend is None:
        return
    config_of(backend, None, further_keys(os.environ))
    from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum, register_diffusion_backend

    if SLOT not in DiffusionAttentionBackendEnum.__members__:
        raise BackendUnavailable(f"{SWITCH}: this vllm-omni has no attention backend {SLOT}: pip install 'vllm-omni>=0.30'")
    member, path = DiffusionAttentionBackendEnum[SLOT], f"{__name__}.{CLASS_NAME}"
    if member.is_overridden() and member.get_path() != path:
        raise BackendUnavailable(
            f"{SWITCH}: another plug-in put {member.get_path()} in the place of {SLOT}; leave one of the two out (VLLM_PLUGINS)"
        )
    register_diffusion_backend(member, path)
    atexit.unregister(RUN.finish)
    atexit.register(RUN.finish)
    logger.info("ditattn: %s serves %s (%s)", backend.name, SLOT, SWITCH)


def __getattr__(name: str) -> Any:
    """The class that vllm-omni's registry finds here by its path is made when it asks for it, from vllm-omni's own bases."""
    if name != CLASS_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    backend = asked_backend(os.environ)
    if backend is None:
        raise AttributeError(f"{name} exists where {SWITCH} names a backend")
    return host_backend(backend, os.environ.get(KEYS, ""))


@cache
def host_backend(backend: type[AttentionBackend], keys: str) -> type:
    """A backend class of vllm-omni's that a backend of ours serves.

    What it says about masks and padding is what the platform's own dense backend says, which computes every dense call.
    """
    from vllm_omni.diffusion.attention.backends import abstract
    from vllm_omni.diffusion.attention.selector import HEAD_SIZE_UNKNOWN
    from vllm_omni.platforms import current_omni_platform

    dense = _host_dense(HEAD_SIZE_UNKNOWN)

    class DitattnBackend(abstract.AttentionBackend):
        supports_prefix_kv_slicing = dense.supports_prefix_kv_slicing
        supports_piecewise_spans = dense.supports_piecewise_spans

        @classmethod
        def supports_packed_mask_free(cls) -> bool:
            return bool(dense.supports_packed_mask_free())

        @classmethod
        def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
            return bool(dense.supports_attention_mask(None))

        @classmethod
        def validate_available(cls) -> None:
            device = find_device(current_omni_platform.device_type)
            reason = backend.why_not(device)
            if reason is not None:
                raise BackendUnavailable(f"{SWITCH}: '{backend.name}' was asked for on {device.device_type}: {reason}")
            if current_omni_platform.is_npu():
                logger.warning("ditattn: %s serves %s instead of vllm-omni's kernel for Ascend, as %s asks", backend.name, SLOT, SWITCH)

        @staticmethod
        def get_name() -> str:
            return SLOT

        @staticmethod
        def get_impl_cls() -> type:
            return _host_impl(backend, keys)

        @staticmethod
        def get_supported_head_sizes() -> list[int]:
            return backend.get_supported_head_sizes()

    return DitattnBackend


@cache
def _host_dense(head_size: int) -> Any:
    """The dense backend that the platform takes where nobody names one."""
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm_omni.platforms import current_omni_platform

    # one choice for all models and head sizes that it can serve, so that what the class says about masks is true of every layer
    path = current_omni_platform.get_diffusion_attn_backend_cls(selected_backend=None, head_size=head_size, allow_trtllm_default=False)
    return resolve_obj_by_qualname(path)


@cache
def _warn_unused(name: str, arguments: tuple[str, ...]) -> None:
    """The host's interface grows: what is new in it is named once, not dropped in silence."""
    if arguments:
        logger.warning("ditattn: %s makes no use of what layers are given as %s", name, ", ".join(arguments))


@cache
def _host_impl(backend: type[AttentionBackend], keys: str) -> type:
    from vllm_omni.diffusion.attention.backends import abstract
    from vllm_omni.diffusion.config import get_current_diffusion_config_or_none

    ours = further_keys({KEYS: keys})

    class DitattnImpl(abstract.AttentionImpl):
        def __init__(
            self,
            num_heads: int,
            head_size: int,
            softmax_scale: float,
            causal: bool = False,
            num_kv_heads: int | None = None,
            prefix: str = "",
            qkv_layout: str | None = None,
            backend_kwargs: dict[str, Any] | None = None,
            role: str = "self",
            backend_explicit: bool = True,
            **extra: Any,
        ) -> None:
            _warn_unused(backend.name, tuple(extra))
            if qkv_layout is not None and qkv_layout.upper() != "BSND":
                raise UnsupportedCall(f"{SLOT}, served by ditattn, takes tensors of layout BSND, and layer '{prefix}' has {qkv_layout}")
            check_parallel(getattr(get_current_diffusion_config_or_none(), "parallel_config", None))
            self._role = role
            sizes: dict[str, Any] = {"num_heads": num_heads, "head_size": head_size, "softmax_scale": softmax_scale}
            sizes |= {"causal": causal, "num_kv_heads": num_kv_heads, "prefix": prefix}
            self._layer = Layer(backend, config_of(backend, backend_kwargs, ours), RUN, **sizes)
            self._dense = _host_dense(head_size).get_impl_cls()(**sizes, qkv_layout=qkv_layout)

        # the step changes from call to call, and compiled code would keep one
        @torch.compiler.disable
        def forward_cuda(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
            tokens = Tokens.of(query, key, attn_metadata, self._role)
            return self._layer.attend(
                query, key, value, tokens, _running_step(), lambda: self._dense.forward(query, key, value, attn_metadata)
            )

        forward_npu = forward_xpu = forward_cuda

    return DitattnImpl


def _running_step() -> Step:
    """As the host's forward context has it."""
    from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return Step(None, None, "none")
    context = get_forward_context()
    source = "none" if context.denoise_step_idx is None else "forward context"
    return Step(context.denoise_step_idx, context.total_denoise_steps, source)
