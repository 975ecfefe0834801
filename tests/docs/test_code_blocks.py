"""Every code block of README.md and docs/ runs: Python on tiny pipelines, commands up to the work that they would begin.

A fenced block without a language that does not begin with a command is output. A block that cannot run has a comment before it that says
why: `<!-- not run: needs two GPUs -->`.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from ditattn.backends.registry import RECOMMENDED_BACKEND
from ditattn.backends.setting import Setting
from ditattn.cli.app import app, run
from ditattn.cli.settings import CompareSettings
from ditattn.compare.setting import expand
from ditattn.hosts.sglang.config import parse_setting
from ditattn.values import parse_config
from hub_stand_ins import hub_stand_ins as hub_stand_ins
from hub_stand_ins import stand_in

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
VERBS = ("generate", "compare", "tune", "backends", "models", "bench")

# what a page has prepared before its first block
PREPARED = {"docs/comparing.md": lambda: {"pipe": stand_in("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")}}


@dataclass(frozen=True)
class Block:
    """A code block: where it is, its language ("" if none is named), its text, and why it is not run."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Fenced and indented code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    fence = r"(?:<!-- not run: (?P<why>[^\n]+?) -->\n)?^(?P<margin> *)```(?P<language>\w*)\n(?P<fenced>.*?)^(?P=margin)```$"
    indented = r"(?<=\n\n)(?P<indented>(?: {4}(?:python|make|torchrun|ATEN_)[^\n]*\n)(?: {4}[^\n]*\n)*)"
    found = []
    for match in re.finditer(rf"{fence}|{indented}", text, re.MULTILINE | re.DOTALL):
        code = match["fenced"] if match["fenced"] is not None else match["indented"]
        margin = len(match["margin"] or "") if match["fenced"] is not None else 4
        line = text[: match.start("fenced" if match["fenced"] is not None else "indented")].count("\n") + 1
        code = "".join(part[margin:] if part.strip() else part for part in code.splitlines(keepends=True))
        found.append(Block(page, line, match["language"] or "", code, match["why"]))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON_PAGES = sorted({block.page for block in BLOCKS if block.language == "python" and block.not_run is None})


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block, split into words, without comments and variables; none where the block is output."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = [shlex.split(line, comments=True) for line in lines] if looks_like_commands(lines) else []
    return [words for words in map(_without_variables, found) if words]


def looks_like_commands(lines: list[str]) -> bool:
    return bool(lines) and re.match(r"([A-Z_]+=\S+ )*(ditattn|make|pip|torchrun|sglang|python -m)( |$)", lines[0]) is not None


def _without_variables(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words = words[1:]
    return words


COMMANDS = [
    pytest.param(words, id=f"{block.place} {' '.join(words)[:60]}")
    for block in BLOCKS
    if block.language == "" and block.not_run is None
    for words in commands_of(block)
]


def test_languages_are_known() -> None:
    assert {block.language for block in BLOCKS} <= {"", "python", "toml", "text"}
    assert len([block for block in BLOCKS if block.language == "python"]) >= 8
    assert len(COMMANDS) >= 25


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("hub_stand_ins")
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    prepare = PREPARED.get(page.relative_to(ROOT).as_posix())
    names: dict[str, Any] = {"__name__": "__main__", **(prepare() if prepare else {})}
    run = [block for block in blocks_of(page) if block.language == "python" and block.not_run is None]
    for block in run:
        # a failure shows the line of the page
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
    if any("handle.report().summary()" in block.text for block in run):
        assert re.search(r"permuted_sparse_attn: \d+ sparse at density 0\.\d+", capsys.readouterr().out)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "toml"], ids=lambda block: block.place)
def test_toml_can_be_read(block: Block) -> None:
    assert tomllib.loads(block.text)


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_are_understood(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program, *arguments = words
    for word in arguments:
        if word.endswith(".yaml"):
            # a file that another command of the page has written
            Path(word).parent.mkdir(parents=True)
            Path(word).write_text("sparsity: 0.5\n", encoding="utf-8")
    CHECKS[program](arguments, monkeypatch)


def _check_ditattn(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is read and checked; the work is not begun."""
    verb, *options = arguments
    assert verb in VERBS
    if options[:1] == ["..."]:
        # the options of the page's earlier commands
        options = ["--prompt", "a cat", "--attention-backend", RECOMMENDED_BACKEND, *options[1:]]
    begun: list[Any] = []
    if verb in ("generate", "compare", "tune"):
        monkeypatch.setattr(f"ditattn.cli.{verb}.run", lambda settings, debug: begun.append(settings))
        assert run([verb, *options]) == 0
        _check_attention(*begun)
        return
    group = typer.main.get_command(app)
    command = group.get_command(click.Context(group), verb)  # type: ignore[attr-defined]
    # only parsed: a wrong option raises
    command.make_context(verb, options)


def _check_attention(settings: Any) -> None:
    """What would be installed is possible."""
    if isinstance(settings, CompareSettings):
        assert expand(settings.attention_backend, settings.attention_backend_config, settings.grid)
    else:
        assert Setting.parse(settings.attention_backend or RECOMMENDED_BACKEND, settings.attention_backend_config)


def _check_make(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in (word for word in arguments if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def _check_pip(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(rf"(?:{project['name']}|\.)\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def _check_torchrun(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that every process runs."""
    module = arguments.index("-m") + 1
    CHECKS[arguments[module]](arguments[module + 1 :], monkeypatch)


def _check_python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of this checkout, whose source, or that of what it imports beside it, names each of the options."""
    flag, module, *options = arguments
    assert flag == "-m"
    if module == "pytest":
        assert all((ROOT / word).exists() for word in options if not word.startswith("-"))
        return
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    for option in (word for word in options if word.startswith("--")):
        assert f'"{option}"' in source, option


def _check_sglang(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of us can be served; tests/hosts/sglang reads the commands with sglang's own parser."""
    given = dict(itertools.pairwise(arguments))
    assert parse_setting(given["--attention-backend"], parse_config(given["--attention-backend-config"]))


CHECKS = {
    "ditattn": _check_ditattn,
    "make": _check_make,
    "pip": _check_pip,
    "python": _check_python,
    "sglang": _check_sglang,
    "torchrun": _check_torchrun,
}


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.text.startswith("$ ") and block.not_run is None], ids=lambda block: block.place
)
def test_shown_output_is_what_the_command_prints(block: Block, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    command, _, output = block.text.partition("\n")
    program, *arguments = shlex.split(command.removeprefix("$ "))
    assert program == "ditattn"
    assert run(arguments) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()] == output.strip().splitlines()
