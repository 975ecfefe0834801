"""One call of ComfyUI's attention: tensors in our form, the answer in its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

__all__ = ["Call"]


class Call:
    """One call of ComfyUI's attention, and how it would run without us.

    Args:
        function: ComfyUI's own, or that of a node before ours.
        q, k, v: `[B, S, H * D]`, or `[B, H, S, D]` with `skip_reshape`.
        more: every further argument, by name.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None,
        attn_precision: Any,
        skip_reshape: bool,
        skip_output_reshape: bool,
        more: Mapping[str, Any],
    ) -> None:
        self.mask, self.more = mask, more
        self._function, self._qkv, self._heads = function, (q, k, v), heads
        self._precision, self._split, self._answer_split = attn_precision, skip_reshape, skip_output_reshape

    @property
    def options(self) -> Mapping[str, Any]:
        return self.more.get("transformer_options") or {}

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views `[B, S, H, D]`."""
        q, k, v = self._qkv
        if self._split:
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        head_size = q.shape[-1] // self._heads
        return q.unflatten(-1, (-1, head_size)), k.unflatten(-1, (-1, head_size)), v.unflatten(-1, (-1, head_size))

    def native(self) -> Tensor:
        """In ComfyUI's form."""
        return self._function(
            *self._qkv,
            self._heads,
            mask=self.mask,
            attn_precision=self._precision,
            skip_reshape=self._split,
            skip_output_reshape=self._answer_split,
            **self.more,
        )

    def native_tensor(self) -> Tensor:
        """The same as `[B, S, H, D]`."""
        out = self.native()
        return out.transpose(1, 2) if self._answer_split else out.unflatten(-1, (self._heads, -1))

    def answer(self, out: Tensor) -> Tensor:
        """`[B, S, H, D]` in the form that was asked for."""
        return out.transpose(1, 2) if self._answer_split else out.flatten(2)
