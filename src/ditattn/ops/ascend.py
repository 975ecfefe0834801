"""What the Ascend implementations of the ops share: operators, whether this machine has them, and the operators' layouts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ditattn.devices.npu import cann_version, soc_generation, soc_name
from ditattn.ops.table import CallFacts
from ditattn.packages import Package

__all__ = ["Operator", "Provider", "first_of", "padded_head_dim", "to_heads_first"]

# what the block-sparse kernels are compiled for; other head sizes are padded with zeros, which changes no score
_HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class Operator:
    """An operator that a package registers with torch.

    Attributes:
        package: registers it when imported.
        namespace, names: `torch.ops.<namespace>.<name>`; of several names the first that exists is meant.
        takes: an argument that tells it from another operator of the same name.
        generations: SoC generations it is built for.
        instead: what to name on another generation.
        min_cann: least version of CANN (major, minor); None if it brings its own kernels.
    """

    package: Package
    namespace: str
    names: tuple[str, ...]
    takes: str
    generations: tuple[str, ...]
    instead: str = ""
    min_cann: tuple[int, int] | None = None

    def wrong_generation(self) -> str | None:
        """Why no package brings it to this device, or None."""
        generation = soc_generation()
        if generation is None or generation in self.generations:
            return None
        return f"the operator runs on Ascend {' and '.join(self.generations)}, this is {soc_name()} ({generation}): use {self.instead}"

    def why_not(self) -> str | None:
        """Why this machine cannot run it, or None. Imports the package."""
        known = cann_version()
        if self.min_cann and known and known < self.min_cann:
            return f"{self._title} needs CANN {_dotted(self.min_cann)} or newer, this is {_dotted(known)}"
        try:
            importlib.import_module(self.package.module)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return f"package '{self.package.module}' is installed but does not load: {reason}"
        if self._found() is None:
            return f"the installed {self.package.module} has no {self._title} that takes {self.takes}: {self.package.install}"
        return None

    def load(self) -> Callable[..., Any]:
        """The operator; `why_not` has said that it exists."""
        importlib.import_module(self.package.module)
        found = self._found()
        assert found is not None, self._title
        return found

    def _found(self) -> Callable[..., Any] | None:
        namespace = getattr(torch.ops, self.namespace)
        found = (getattr(namespace, name) for name in self.names if hasattr(namespace, name))
        return next((op for op in found if self.takes in (argument.name for argument in op.default._schema.arguments)), None)

    @property
    def _title(self) -> str:
        return f"torch.ops.{self.namespace}.{self.names[0]}"


@dataclass(frozen=True)
class Provider:
    """One operator of one package behind an op's contract: what a row of the op's table names. Subclasses add `run`."""

    operator: Operator

    def machine(self) -> str | None:
        """Why nothing to install would help on this machine, or None."""
        return self.operator.wrong_generation()

    def probe(self) -> str | None:
        """Why it cannot run here, or None."""
        return self.operator.why_not()

    def limits(self, facts: CallFacts) -> str | None:
        """Why the operator refuses such a call on every machine, or None."""
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def padded_head_dim(head_dim: int) -> int:
    """The smallest head size, at least as large, that the block-sparse operators take."""
    return next(dim for dim in _HEAD_DIMS if head_dim <= dim)


def to_heads_first(x: Tensor, head_dim: int, length: int | None = None) -> Tensor:
    """`[B, S, H, D]` -> contiguous `[B, H, length, head_dim]`, zero-padded, in one copy at most."""
    x = x.transpose(1, 2)
    missing = (0, head_dim - x.shape[3], 0, (length or x.shape[2]) - x.shape[2])
    return pad(x, missing).contiguous() if any(missing) else x.contiguous()


def first_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of an operator that returns it alone in some versions and beside its log-sum-exp in others."""
    return result if isinstance(result, Tensor) else result[0]
