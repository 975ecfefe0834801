"""The four classes that sglang asks for, as subclasses of its own: thin, since layers, steps and plans are served elsewhere.

Each name of NAMES is a class of this module, made when sglang resolves its dotted path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from ditattn.errors import UnsupportedCall
from ditattn.hosts.sglang.config import NAMES, global_keys, parse_setting
from ditattn.hosts.sglang.serving import Layer, logger, serving
from ditattn.hosts.sglang.stages import watch_requests

# arguments of sglang's layers that change nothing here: how its own kernels are chosen, and how projections outside attention are quantised
WITHOUT_EFFECT = frozenset({"allow_cudnn_sdp", "quant_config"})


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return _backend_class(name)


@cache
def _backend_class(name: str) -> Any:
    """The backend class that serves a name; as soon as one is asked for, reports of requests are logged."""
    from sglang.multimodal_gen.runtime.layers.attention.backends.attention_backend import (
        AttentionBackend,
        AttentionImpl,
        AttentionMetadata,
        AttentionMetadataBuilder,
    )
    from sglang.multimodal_gen.runtime.layers.attention.backends.sdpa import SDPAImpl
    from sglang.multimodal_gen.runtime.layers.attention.selector import get_component_attn_backend_context
    from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum

    from ditattn.backends.registry import load_backend

    watch_requests()

    @dataclass
    class Metadata(AttentionMetadata):
        """Facts of a step, the same for every backend: what they mean for one is worked out where it is served.

        Attributes:
            raw_latent_shape: whole latent shape, `[B, C, T, H, W]` for videos.
            patch_size: (t, h, w).
        """

        raw_latent_shape: Any = None
        patch_size: Any = None

    class MetadataBuilder(AttentionMetadataBuilder):
        """Takes what sglang's denoising stage says of a step.

        Its `skip_first_steps` and `sparsity` come from the configuration that the layers have read and checked, with sglang's defaults
        where nothing is given.
        """

        def build(
            self,
            current_timestep: int,
            raw_latent_shape: Any = None,
            patch_size: Any = None,
            skip_first_steps: Any = None,
            sparsity: Any = None,
            **kwargs: Any,
        ) -> Metadata:
            if kwargs:
                raise UnsupportedCall(
                    f"metadata of {name}: sglang says {', '.join(kwargs)}, and this version does not know what that means"
                )
            return Metadata(current_timestep, raw_latent_shape, patch_size)

    class Impl(AttentionImpl):
        """One attention layer. What is not self-attention of a denoiser is left to sglang's SDPA."""

        def __init__(
            self,
            num_heads: int,
            head_size: int,
            softmax_scale: float,
            causal: bool = False,
            num_kv_heads: int | None = None,
            prefix: str = "",
            is_cross_attention: bool = False,
            **extra_impl_args: Any,
        ) -> None:
            self._theirs = SDPAImpl(num_heads, head_size, causal, softmax_scale, num_kv_heads, prefix, **extra_impl_args)
            check_extras(name, extra_impl_args)
            context = get_component_attn_backend_context()
            # encoders and decoders may take another backend than the global one, denoisers may not
            is_denoiser = context is None or not context.allow_global_backend_fallback
            self._layer: Layer | None = None
            if is_denoiser and not is_cross_attention:
                component = getattr(context, "component_name", None) or "transformer"
                model = serving().model(component, parse_setting(name, global_keys()))
                path = prefix.removesuffix("impl").removesuffix(".")
                self._layer = Layer(model, path, num_heads, causal, softmax_scale, self._theirs_without_metadata)

        def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any) -> Tensor:
            if self._layer is None:
                theirs: Tensor = self._theirs.forward(query, key, value, attn_metadata)
                return theirs
            return self._layer(query, key, value)

        def _theirs_without_metadata(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = self._theirs.forward(query, key, value, None)
            return out

    class Backend(AttentionBackend):
        """Ring attention and packed sequences of several lengths are not served; sglang says so when it builds such a layer."""

        # sglang's denoising stage builds metadata for the names that it knows as sparse
        has_metadata_of_ditattn = load_backend(name).is_sparse

        @staticmethod
        def get_enum() -> Any:
            return AttentionBackendEnum[name.upper()]

        @staticmethod
        def get_impl_cls() -> Any:
            return Impl

        @staticmethod
        def get_metadata_cls() -> Any:
            return Metadata

        @staticmethod
        def get_builder_cls() -> Any:
            return MetadataBuilder

        @staticmethod
        def get_supported_head_sizes() -> list[int]:
            setting = parse_setting(name, global_keys())
            return load_backend(setting.config_owner).get_supported_head_sizes()

    for made in (Metadata, MetadataBuilder, Impl, Backend):
        made.__qualname__ = f"{name}.{made.__name__}"
    return Backend


def check_extras(name: str, extras: Mapping[str, Any]) -> None:
    """What sglang's layers hand on beside the arguments of every backend: without effect here, or refused.

    Raises:
        UnsupportedCall: dropout.
    """
    if extras.get("dropout_p"):
        raise UnsupportedCall(f"{name}: attention dropout is for training; this package is forward only (got {extras['dropout_p']})")
    unknown = sorted(extras.keys() - WITHOUT_EFFECT - {"dropout_p"})
    if unknown:
        logger().warning_once(f"{name}: {', '.join(unknown)} of an attention layer is not known to ditattn and changes nothing")
