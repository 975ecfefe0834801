"""Imports point down: check every import of the package against the floors of the house. Exit status 1 and one line per violation."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "src"

# From the roof to the cellar. A module may import from its own package and from every floor below its own.
FLOORS: list[list[str]] = [
    ["ditattn.cli"],
    ["ditattn.tuning"],
    ["ditattn.comparison"],
    # measurement times whole backends and is shown by a verb of the command line
    ["ditattn.pipelines", "ditattn.measurement"],
    ["ditattn.attention.backends", "ditattn.attention.selector"],
    ["ditattn.attention.sparse", "ditattn.attention.dense"],
    ["ditattn.attention.selection"],
    ["ditattn.ops", "ditattn.models", "ditattn.platforms"],
    ["ditattn.attention.interface", "ditattn.attention.token_order", "ditattn.attention.plan_memory"],
    ["ditattn.attention.plan", "ditattn.config", "ditattn.packages"],
    ["ditattn.errors", "ditattn._version"],
]

# These know each other by contract only: no file in the folder imports a sibling.
STRANGERS = ["ditattn.attention.backends", "ditattn.attention.selection"]

# Optional packages and the places that may import them, inside a function or lazily.
ONLY_IN: dict[str, list[str]] = {
    "diffusers": ["ditattn.pipelines.diffusers"],
    "transformers": ["ditattn.pipelines.diffusers"],
    "tokenizers": ["ditattn.pipelines.diffusers"],
    "imageio": ["ditattn.cli"],
    "imageio_ffmpeg": ["ditattn.cli", "ditattn.comparison"],
    "torchmetrics": ["ditattn.comparison"],
    "jinja2": ["ditattn.comparison"],
    "typer": ["ditattn.cli"],
    "rich": ["ditattn.cli"],
}
ONLY_IN_STEM: dict[str, list[str]] = {
    "triton": ["triton"],
    "torch_npu": ["ascend", "npu"],
    "attentions": ["ascend"],
    "sgl_kernel_npu": ["ascend"],
    "mindiesd": ["ascend"],
}


def floor_of(module: str) -> int | None:
    for number, floor in enumerate(FLOORS):
        if any(module == room or module.startswith(room + ".") for room in floor):
            return number
    return None


def imported(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


def complaint(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, or None."""
    root = target.split(".")[0]
    if root in ONLY_IN and not any(module == place or module.startswith(place + ".") for place in ONLY_IN[root]):
        return f"{root} is imported only under {', '.join(ONLY_IN[root])}"
    if root in ONLY_IN_STEM and module.rsplit(".", 1)[-1] not in ONLY_IN_STEM[root]:
        return f"{root} is imported only in files named {', '.join(ONLY_IN_STEM[root])}"
    if root != "ditattn" or target == "ditattn":
        return None
    for room in STRANGERS:
        if module.startswith(room + ".") and target.startswith(room + "."):
            return f"files of {room} do not know each other"
    here, there = floor_of(module), floor_of(target)
    if here is None or there is None:
        return None
    return None if here <= there else "imports point down"


def main() -> int:
    problems = []
    for path in sorted((ROOT / "ditattn").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for line, target in imported(path):
            if reason := complaint(module, target):
                problems.append(f"{path}:{line}: {module} imports {target}: {reason}")
    print("\n".join(problems) or "import layers: ok")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
