"""Pages of the documentation site that are made from files outside of docs/, and menu entries that stand for a folder (hooks of mkdocs).

Links in docs/ lead to those files, so that they work where the repository is read; in the site they lead to the pages made from them.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

# page of the site: the file or folder that it shows
SOURCES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md", "examples.md": "examples"}

LINK = re.compile(r"\]\(([^)#\s]+)((?:#[^)]*)?)\)")


def on_config(config: Any) -> Any:
    """Menu entries such as "backends/*.md" become the pages of that folder."""
    config["nav"] = _expanded(config["nav"])
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of `SOURCES`."""
    from mkdocs.structure.files import File

    for page, source in SOURCES.items():
        files.append(File.generated(config, page, content=page_of(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links that leave docs/ for a file of `SOURCES` lead to its page."""
    return in_site(markdown, page.file.src_uri)


def page_of(source: str) -> str:
    """The page that shows a file of the root, or a folder of Python programs; its links are those of a page in docs/."""
    path = ROOT / source
    if path.is_dir():
        return "# Examples\n\n" + "\n".join(_program(file) for file in sorted(path.glob("*.py")))
    text = path.read_text(encoding="utf-8")
    return LINK.sub(lambda link: f"]({_from_docs(link[1])}{link[2]})", text)


def in_site(markdown: str, page: str) -> str:
    """`markdown` of `page` (a path in docs/), with links to `SOURCES` turned to their pages."""
    here = (DOCS / page).parent
    up = "../" * page.count("/")

    def turned(link: re.Match[str]) -> str:
        if "://" in link[1]:
            return link[0]
        target = (here / link[1]).resolve()
        for made, source in SOURCES.items():
            if target == ROOT / source or target.parent == ROOT / source:
                anchor = f"#{target.stem}" if target.suffix == ".py" else link[2]
                return f"]({up}{made}{anchor})"
        return link[0]

    return LINK.sub(turned, markdown)


def _expanded(entries: Any) -> Any:
    """`entries` of a menu with its patterns replaced."""
    if isinstance(entries, dict):
        return {title: _expanded(below) for title, below in entries.items()}
    if isinstance(entries, list):
        return [made for entry in entries for made in (_matching(entry) if isinstance(entry, str) and "*" in entry else [_expanded(entry)])]
    return entries


def _matching(pattern: str) -> list[str]:
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob(pattern))


def _from_docs(target: str) -> str:
    """A link of a file in the root, as a page in docs/ would write it."""
    if "://" in target:
        return target
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"


def _program(file: Path) -> str:
    """Heading, first sentence of the docstring, source."""
    text = file.read_text(encoding="utf-8")
    about = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].replace("\n", " ")
    return f"## {file.stem}\n\n{about}\n\n```python\n{text}```\n"
