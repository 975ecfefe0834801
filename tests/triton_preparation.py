"""Triton's interpreter without what it does again and again: half of the time of small kernels."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def prepare_once_per_kernel() -> None:
    """A kernel's language is put in place when it starts, and for every call of a function inside it again: leave that out, but for a
    function of a module that names the language otherwise than those before it. What kernels compute stays the same.
    """
    put_in_place, start = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: set[tuple[bool, bool]] = set()

    def started(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.clear()
        return start(self, *args, **kwargs)

    def once(function: Any) -> Any:
        names = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        kind = (tl in names, tl.core in names)
        if kind in seen:
            return None
        seen.add(kind)
        return put_in_place(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = started, once
