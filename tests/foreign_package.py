"""Packages of other people that bring backends: written to a folder, as pip would leave them, and put on the path."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from ditattn.backends import registry

PAGE = Path(__file__).resolve().parents[1] / "docs" / "adding_a_backend.md"

BROKEN = {
    "gone_attn": "broken_package.no_such_module:Backend",
    "raising_attn": "broken_package.raising:Backend",
    "lacking_attn": "broken_package.things:NoSuchBackend",
    "wrong_attn": "broken_package.things:NotABackend",
    "misnamed_attn": "broken_package.things:MisnamedBackend",
    "operating_attn": "broken_package.things:OperatingBackend",
    "unformed_attn": "this is no target",
    "torch_sdpa": "broken_package.things:MisnamedBackend",
    "Shouting_Attn": "broken_package.things:MisnamedBackend",
}
"""Every way in which an entry point can be unusable."""

THINGS = """
from ditattn.backends.torch_sdpa import TorchSDPABackend

class NotABackend:
    name = "wrong_attn"

class MisnamedBackend(TorchSDPABackend):
    name = "other_name"

class OperatingBackend(TorchSDPABackend):
    name = "operating_attn"
    ops = ("no_such_operation",)
"""


def _section() -> str:
    return PAGE.read_text(encoding="utf-8").partition("## A method\n")[2].partition("\n## ")[0]


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", _section(), re.MULTILINE | re.DOTALL)


def write_package(folder: Path, name: str, modules: Mapping[str, str], entry_points: Mapping[str, str]) -> None:
    """A package with its metadata."""
    (folder / name).mkdir(parents=True)
    for module, code in {"__init__": "", **modules}.items():
        (folder / name / f"{module}.py").write_text(code, encoding="utf-8")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    lines = [f"[{registry.ENTRY_POINTS}]", *(f"{key} = {value}" for key, value in entry_points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_documented_package(folder: Path) -> None:
    """The package of docs/adding_a_backend.md, word for word."""
    (toml,) = _blocks("toml")
    entry_points = tomllib.loads(toml)["project"]["entry-points"][registry.ENTRY_POINTS]
    write_package(folder, "my_package", {"nearest": "\n\n".join(_blocks("python"))}, entry_points)


def write_broken_package(folder: Path) -> None:
    """A package none of whose entry points can be used."""
    write_package(folder, "broken_package", {"things": THINGS, "raising": "raise RuntimeError('no licence\\nfound')"}, BROKEN)


@contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """As if the packages in `folder` had been installed before this process began, but for AttentionBackendEnum, made at import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        _forget()
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] in ("my_package", "broken_package")]:
                del sys.modules[name]
    _forget()


def _forget() -> None:
    registry._declared.cache_clear()
    registry._load.cache_clear()
