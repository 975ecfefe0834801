"""Which pipelines of the installed diffusers run which transformer: read from their sources, since importing them all takes long."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import diffusers

__all__ = ["pipelines_by_transformer"]

_CLASS = re.compile(r"^class (\w+Pipeline)\(", re.MULTILINE)
_CONSTRUCTOR = re.compile(r"def __init__\((.*?)\)(?: -> None)?:\n", re.DOTALL)
_TRANSFORMER = re.compile(r"^\s*transformer\w*: (.+?),?$", re.MULTILINE)


@cache
def pipelines_by_transformer() -> dict[str, tuple[str, ...]]:
    """Names of the pipeline classes by the transformer class that their constructors ask for, in alphabetical order."""
    found: dict[str, set[str]] = {}
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        text = path.read_text(encoding="utf-8")
        # name, body, name, body, ...
        _, *parts = _CLASS.split(text)
        for pipeline, body in zip(parts[::2], parts[1::2], strict=True):
            constructor = _CONSTRUCTOR.search(body)
            for annotation in _TRANSFORMER.findall(constructor[1] if constructor else ""):
                for name in re.findall(r"\w+", annotation):
                    found.setdefault(name, set()).add(pipeline)
    return {name: tuple(sorted(pipelines)) for name, pipelines in found.items()}
