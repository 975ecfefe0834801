"""A tiny Wan of fake tensors on npu:0, and the names of the operators that it calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers.models.transformers.transformer_wan  # outside of any device context  # noqa: F401
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_pipelines.wan import transformer

GRID = (5, 16, 16)
A2, A5 = "Ascend910B2", "Ascend950PR_9579"


class Called(TorchDispatchMode):
    """Names of the operators that ran, outside torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in ("aten", "prim", "prims"):
            self.names.append(f"{func.namespace}.{func.overloadpacket.__name__}")
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_wan(dtype: torch.dtype) -> Iterator[tuple[nn.Module, dict[str, torch.Tensor]]]:
    """The model, and the tensors of one call for a clip of GRID; while the block runs, new tensors are fake ones on npu:0."""
    default = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("npu"):
        torch.set_default_dtype(dtype)
        try:
            model = transformer()
        finally:
            torch.set_default_dtype(default)
        frames, rows, columns = GRID
        yield (
            model,
            {
                "hidden_states": torch.randn(2, 16, frames, 2 * rows, 2 * columns, dtype=dtype),
                "timestep": torch.ones(2, dtype=torch.int64),
                "encoder_hidden_states": torch.randn(2, 8, model.config.text_dim, dtype=dtype),
            },
        )
