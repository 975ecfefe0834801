"""Everything ditattn raises on purpose.

DitattnError
├── ConfigError (ValueError)            a configuration key or value
│   └── UnknownKey                      no such key; names the nearest one
├── UnknownBackend (ValueError)         no such backend name
├── UnsupportedCall (ValueError)        shapes, dtypes or options no implementation of an op takes
│   └── UnsupportedHeadSize             says which head sizes are possible
├── UnsupportedModel (ValueError)       a backend that a model family does not support, or a model we do not know
├── ModelNotLoaded (ValueError)          a model path or hub id that is not there, or that cannot be loaded
├── BackendUnavailable (ImportError)    something is missing on this machine; says what and how to install it
└── DenseInStrictMode (RuntimeError)    strict=True and a call would have run densely
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "ConfigError",
    "DenseInStrictMode",
    "DitattnError",
    "ModelNotLoaded",
    "UnknownBackend",
    "UnknownKey",
    "UnsupportedCall",
    "UnsupportedHeadSize",
    "UnsupportedModel",
]


class DitattnError(Exception):
    """Base of every exception in this package.

    Examples:
        >>> import ditattn, torch
        >>> try:
        ...     ditattn.get_attn_backend(64, torch.float32, pipeline_backend="rain_fusion")
        ... except ditattn.DitattnError as error:
        ...     print(error)  # doctest: +ELLIPSIS
        no attention backend 'rain_fusion'; did you mean 'rain_fusion_attn'? There is torch_sdpa, fa, laser_attn, ...
    """


class ConfigError(DitattnError, ValueError):
    """A configuration value that cannot be honoured."""


class UnknownKey(ConfigError):
    """A configuration key that does not exist."""


class UnknownBackend(DitattnError, ValueError):
    """A backend name that does not exist."""


class UnsupportedCall(DitattnError, ValueError):
    """An attention call that the asked implementation, or every implementation, refuses."""


class UnsupportedHeadSize(UnsupportedCall):
    """A head size that the backend does not support."""


class UnsupportedModel(DitattnError, ValueError):
    """A model family that is unknown, or that does not support the asked backend."""


class ModelNotLoaded(DitattnError, ValueError):
    """A model path or hub id that is not there, or that cannot be loaded."""


class BackendUnavailable(DitattnError, ImportError):
    """A backend or implementation asked for by name cannot run on this machine.

    Examples:
        >>> import ditattn, torch
        >>> query = torch.randn(1, 256, 4, 64)
        >>> try:
        ...     ditattn.dense_attention(query, query, query, implementation="laser_mindiesd")
        ... except ditattn.BackendUnavailable as error:
        ...     print(error)  # doctest: +ELLIPSIS
        implementation 'laser_mindiesd' was asked for (...): runs on npu, not on cpu. Possible here: ...
    """


class DenseInStrictMode(DitattnError, RuntimeError):
    """With strict=True a call that cannot run sparse raises instead of running densely."""
