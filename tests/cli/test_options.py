"""The command line is made from the settings: every key once, with the range, the default and the words of its declaration."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from typing import Any, get_args

import pytest
import typer

from ditattn.backends.config import SparseAttentionConfig
from ditattn.backends.registry import backend_names
from ditattn.cli import options
from ditattn.cli.settings import PANELS, CompareSettings, GenerateSettings, Option, TuneSettings, flag
from ditattn.errors import ConfigError

VERBS = {"generate": GenerateSettings, "compare": CompareSettings, "tune": TuneSettings}
verbs = pytest.mark.parametrize("verb", VERBS)


def declared(settings_cls: Any, name: str) -> Any:
    """What typer is told about an option."""
    parameters = inspect.signature(options.command(settings_cls, "nowhere:run")).parameters
    annotation = parameters[name].annotation
    return next(item for item in annotation.__metadata__ if isinstance(item, typer.models.OptionInfo)), get_args(annotation)[0]


def shown_by(verb: str) -> str:
    command = [sys.executable, "-m", "ditattn", verb, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "250"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@verbs
def test_help_shows_every_key_once_with_its_words_and_default(verb: str) -> None:
    text = shown_by(verb)
    words = " ".join(text.replace("\u2502", " ").split())
    for key, field in VERBS[verb].model_fields.items():
        option = next(item for item in field.metadata if isinstance(item, Option))
        shown = flag(f"no_{key}" if field.default is True else key)
        assert [line.split()[1] for line in text.splitlines()[4:] if f" {shown} " in line and line.split()[1] == shown] == [shown]
        assert option.help in words, key
        if option.default:
            assert f"[default: ({option.default})]" in words
    panels = [line.split()[1] for line in text.splitlines() if line.split()[1:2] and line.split()[1] in PANELS and "\u2500" in line]
    assert panels == [panel for panel in PANELS if panel in panels]


def test_ranges_types_and_defaults_follow_from_the_fields() -> None:
    height, kind = declared(GenerateSettings, "height")
    assert (height.min, height.max, height.show_default, kind) == (1, 1_000_000, "the model's", int | None)
    ssim, kind = declared(TuneSettings, "target_ssim")
    assert (ssim.min, ssim.max, ssim.show_default, kind) == (0, 1, False, float | None)
    # one value for `generate`, of which it counts how many were given
    for settings_cls, metavar in ((GenerateSettings, "<int>"), (CompareSettings, None)):
        seed, found = declared(settings_cls, "seed")
        assert (seed.min, seed.show_default, seed.metavar, found) == (0, "42", metavar, list[int] | None)
    assert declared(GenerateSettings, "attention_backend_config")[1] == list[str] | None
    assert declared(CompareSettings, "attention_backend_config")[1] == list[str] | None
    assert declared(CompareSettings, "grid")[1] == list[str] | None
    # typer keeps the first name of an annotated option in `default`
    assert (declared(GenerateSettings, "strict")[0].default, declared(CompareSettings, "no_probe")[0].default) == ("--strict", "--no-probe")


def test_what_is_given_becomes_settings_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("ditattn.cli.terminal.say", lambda settings, debug: seen.append((settings, debug)))
    command = options.command(CompareSettings, "ditattn.cli.terminal:say")
    values = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    command(**{**values, "prompt": ["a"], "seed": [0], "no_probe": True, "strict": True, "grid": ["sparsity=0.5,0.9"]})
    settings, debug = seen[0]
    assert debug is False
    assert settings.model_dump(exclude_unset=True) == {
        "prompt": ["a"],
        "seed": [0],
        "probe": False,
        "strict": True,
        "grid": {"sparsity": [0.5, 0.9]},
    }
    assert settings.reference_cache is True


def test_names_and_keys_in_the_help_follow_from_the_registry() -> None:
    help_text = declared(GenerateSettings, "attention_backend")[0].help
    assert ", ".join(backend_names()) in help_text
    keys = ", ".join(SparseAttentionConfig.model_fields)
    assert f"Keys of the sparse ones: {keys}." in declared(GenerateSettings, "attention_backend_config")[0].help


def test_one_value_is_taken_as_it_is_and_several_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("ditattn.cli.terminal.say", lambda settings, debug: seen.append(settings))
    command = options.command(GenerateSettings, "ditattn.cli.terminal:say")
    values = {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()}
    command(**{**values, "prompt": ["a"], "seed": [0], "attention_backend": ["fa"]})
    assert seen[0].model_dump(exclude_unset=True) == {"prompt": ["a"], "seed": 0, "attention_backend": "fa"}
    with pytest.raises(ConfigError, match=r"^--seed was given 2 times: 0, 1\. This command takes one value$"):
        command(**{**values, "prompt": ["a"], "seed": [0, 1]})
