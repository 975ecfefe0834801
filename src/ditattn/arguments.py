"""What a caller may pass: wrong types are named where they come in, before some line inside fails on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditattn.errors import UnsupportedCall

__all__ = ["check_count", "check_flag", "check_instance", "check_tensors", "described"]


def described(value: object) -> str:
    """A wrong value for a message: its type, and what it is where that is short."""
    kind = type(value)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    text = repr(value)
    return "None" if value is None else f"{name} {text}" if len(text) <= 40 and "\n" not in text else name


def check_tensors(**given: Any) -> None:
    """Raise UnsupportedCall unless every argument is a plain dense torch tensor.

    Raises:
        UnsupportedCall: names the argument, and what makes a tensor of it.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            remedy = ": torch.from_numpy makes one of it" if type(value).__module__ == "numpy" else ""
            remedy = ": torch.tensor makes one of it" if isinstance(value, (list, tuple)) else remedy
            raise UnsupportedCall(f"{name} must be a torch.Tensor, not {described(value)}{remedy}")
        if value.is_nested or value.layout != torch.strided:
            kind = "a nested tensor" if value.is_nested else f"one of layout {value.layout}"
            makes = "torch.nested.to_padded_tensor" if value.is_nested else f"{name}.to_dense()"
            raise UnsupportedCall(f"{name} must be a dense tensor, not {kind}: {makes} makes one of it")


def check_flag(name: str, value: object) -> None:
    """Raise UnsupportedCall unless `value` is True or False."""
    if not isinstance(value, bool):
        raise UnsupportedCall(f"{name} must be True or False, not {described(value)}")


def check_count(name: str, value: object) -> None:
    """Raise UnsupportedCall unless `value` is a whole number of at least 1."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < 1:
        raise UnsupportedCall(f"{name} must be a positive whole number, not {described(value)}")


def check_instance(name: str, value: object, cls: type, makes: str) -> None:
    """Raise UnsupportedCall unless `value` is a `cls`; `makes` says what makes one."""
    if not isinstance(value, cls):
        raise UnsupportedCall(f"{name} must be a {cls.__name__}, not {described(value)}: {makes}")
