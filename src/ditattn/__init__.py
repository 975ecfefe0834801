"""ditattn: dense and block-sparse attention backends for diffusion transformers."""

from ditattn._version import __version__

__all__ = ["__version__"]
