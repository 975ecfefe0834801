"""What is asked of the linear layers of a pipeline: one value, parsed and checked once. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ditattn.errors import ConfigError

__all__ = ["DESCRIPTION", "METHODS", "Quantization"]

METHODS = ("mxfp4", "mxfp4_dualscale")
"""Formats that weights can be rounded to: MXFP4 of the OCP specification, and with Ascend's float32 scale above the exponents."""

DESCRIPTION = "quant_model_description"
"""How the file that describes an msmodelslim checkpoint begins; it ends with .json."""


@dataclass(frozen=True)
class Quantization:
    """Linear layers in MXFP4. Made by `parse`.

    Attributes:
        method: one of METHODS; None if a checkpoint says it layer by layer.
        checkpoint: folder of an msmodelslim checkpoint.
        skip: patterns of layers that stay as they are, with * and ?.
    """

    method: str | None
    checkpoint: str | None = None
    skip: tuple[str, ...] = ()

    @classmethod
    def parse(cls, method: str | None = None, *, skip: str | Iterable[str] = (), checkpoint: str | Path | None = None) -> Quantization:
        """Check names and that a folder is there.

        Raises:
            ConfigError: no such method, no such folder, both or neither.
        """
        patterns = (skip,) if isinstance(skip, str) else tuple(skip)
        if not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise ConfigError(f"skip must be patterns of layers such as 'blocks.0.*', not {skip!r}")
        if (method is None) == (checkpoint is None):
            raise ConfigError(f"name either a quantisation ({', '.join(METHODS)}) or the folder of a checkpoint")
        if checkpoint is not None:
            return cls(None, _folder(checkpoint), patterns)
        name = str(method).lower()
        if name not in METHODS:
            nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0)[0]
            raise ConfigError(f"no quantisation '{method}'; did you mean '{nearest}'? There is {', '.join(METHODS)}")
        return cls(name, None, patterns)

    @classmethod
    def from_text(cls, text: str, skip: Iterable[str] = ()) -> Quantization:
        """As users type it: a method or the folder of a checkpoint. Raises as `parse`."""
        is_folder = text.lower() not in METHODS and (Path(text).expanduser().is_dir() or "/" in text or "\\" in text)
        return cls.parse(None, checkpoint=text, skip=skip) if is_folder else cls.parse(text, skip=skip)

    @property
    def name(self) -> str:
        """Short, for tables and reports."""
        what = self.method or Path(str(self.checkpoint)).resolve().name
        return what + (f" but {', '.join(self.skip)}" if self.skip else "")


def _folder(checkpoint: str | Path) -> str:
    if not isinstance(checkpoint, (str, Path)):
        raise ConfigError(f"checkpoint must be the path of a folder, not {checkpoint!r}")
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"no folder {checkpoint}: a checkpoint of msmodelslim is a folder with {DESCRIPTION}.json and safetensors files")
    return str(folder)
