"""What import-linter cannot say: optional packages stay in their places, neighbours are strangers, strings that name code point down.

Exit status 1 and one line per violation. The floors themselves are a contract of import-linter, in pyproject.toml.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# These know each other by contract only: no method and no selection imports a sibling.
# The first group is the neighbour, a file or a folder.
METHODS = r"(ditattn\.backends\.(?:\w+_attn|fa|torch_sdpa))(\..+)?"
STRANGERS = [METHODS, r"(ditattn\.backends\.selection\.\w+)"]

# Optional packages and the places that may import them, inside a function or lazily.
ONLY_IN: dict[str, list[str]] = {
    "diffusers": ["ditattn.hosts.diffusers"],
    "transformers": ["ditattn.hosts.diffusers"],
    "tokenizers": ["ditattn.hosts.diffusers"],
    "vllm_omni": ["ditattn.hosts.vllm_omni"],
    "vllm": ["ditattn.hosts.vllm_omni"],
    "sglang": ["ditattn.hosts.sglang"],
    "imageio": ["ditattn.cli"],
    "imageio_ffmpeg": ["ditattn.cli", "ditattn.compare"],
    "torchmetrics": ["ditattn.compare"],
    "jinja2": ["ditattn.compare"],
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


def floors() -> list[list[str]]:
    """The contract of import-linter, from the roof to the cellar."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    return [[f"ditattn.{room.strip()}" for room in layer.split(":")] for layer in layers]


def floor_of(module: str) -> int | None:
    """Number of the floor, the roof first; None for the package itself, which stands above all."""
    for number, rooms in enumerate(floors()):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return number
    return None


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module


def named_in_strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """String literals of the form "ditattn.module" or "ditattn.module:attribute"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"ditattn(\.\w+)+(:[\w.]+)?", node.value):
            yield node.lineno, node.value


def complaint(module: str, target: str) -> str | None:
    """Why `module` may not import `target`, or None."""
    root = target.split(".")[0]
    if root in ONLY_IN and not any(module == place or module.startswith(place + ".") for place in ONLY_IN[root]):
        return f"{root} is imported only under {', '.join(ONLY_IN[root])}"
    if root in ONLY_IN_STEM and module.rsplit(".", 1)[-1] not in ONLY_IN_STEM[root]:
        return f"{root} is imported only in files named {', '.join(ONLY_IN_STEM[root])}"
    for room in STRANGERS:
        here, there = re.fullmatch(room, module), re.fullmatch(room, target)
        if here is not None and there is not None and here[1] != there[1]:
            return "files of one room do not know each other"
    return None


def complaint_of_string(module: str, target: str) -> str | None:
    """Why `module` may not name `target` in a string, or None: it points up, or there is no such thing."""
    here, there = floor_of(module), floor_of(target.partition(":")[0])
    if here is not None and there is not None and there < here:
        return "strings that name code point down"
    return None if _exists(target) else "there is no such module or attribute"


def _exists(target: str) -> bool:
    """Triton is optional, so the modules that import it are read and not imported."""
    module, _, attribute = target.partition(":")
    path = ROOT / "src" / Path(*module.split("."))
    if not (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()):
        return target in GROUPS
    if not attribute:
        return True
    if module.endswith(".triton"):
        tree = ast.parse(path.with_suffix(".py").read_text(encoding="utf-8"))
        return any(isinstance(node, ast.FunctionDef) and node.name == attribute for node in tree.body)
    try:
        attrgetter(attribute)(importlib.import_module(module))
    except AttributeError:
        return False
    return True


# entry points are grouped under names that look like modules
GROUPS = {"ditattn.backends"}


def main() -> int:
    problems = []
    for path in sorted((ROOT / "src" / "ditattn").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, target in imported(tree):
            if reason := complaint(module, target):
                problems.append(f"{path}:{line}: {module} imports {target}: {reason}")
        for line, target in named_in_strings(tree):
            if reason := complaint_of_string(module, target):
                problems.append(f"{path}:{line}: {module} names {target}: {reason}")
    print("\n".join(problems) or "imports: ok")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
