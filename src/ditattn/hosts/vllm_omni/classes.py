"""Classes of vllm-omni's that a backend of ours serves, made from vllm-omni's own bases when they are asked for."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ditattn.backends.base import AttentionBackend
from ditattn.devices import find_device
from ditattn.errors import BackendUnavailable, UnsupportedCall
from ditattn.hosts.vllm_omni.block_sparse import config_of
from ditattn.hosts.vllm_omni.environment import KEYS, SLOT, SWITCH, further_keys
from ditattn.hosts.vllm_omni.layer import Layer
from ditattn.hosts.vllm_omni.run import logger, run_of_process
from ditattn.hosts.vllm_omni.tokens import Tokens
from ditattn.runtime.step import Step

__all__ = ["check_parallel", "host_backend"]


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
            self._layer = Layer(backend, config_of(backend, backend_kwargs, ours), run_of_process(), **sizes)
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


def check_parallel(parallel_config: Any) -> None:
    """Raise UnsupportedCall where a rank would see some of the keys alone. Ulysses shows it all of them, for some heads."""
    for key, name in (("ring_degree", "ring attention"), ("allgather_degree", "AllGather-KV")):
        degree = getattr(parallel_config, key, 1)
        if degree > 1:
            raise UnsupportedCall(
                f"{SLOT}, served by ditattn, needs every key of the sequence to choose blocks, and {name} ({key}={degree}) splits them; "
                f"use Ulysses (ulysses_degree) and {key}=1"
            )
