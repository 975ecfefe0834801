"""Names and places of files."""

from __future__ import annotations

import numpy as np
import pytest

from ditattn.cli.output import DraftFiles, default_name, write_media
from ditattn.cli.settings import GenerateSettings, read_settings
from ditattn.errors import ConfigError

PROMPTS = {
    "latin": "a" * 300,
    "three bytes": "圆" * 100,
    "cut after one": "a" + "圆" * 100,
    "cut after two": "ab" + "圆" * 100,
    "four bytes": "\N{MATHEMATICAL BOLD SMALL A}" * 100,
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_a_default_name_can_be_written_whatever_the_alphabet(prompt, tmp_path):
    name = "compare_" + default_name(prompt, "")
    with DraftFiles() as files:
        files.draft(tmp_path / f"{name}.html").write_text("x")
        files.commit()
    assert prompt[:20] in name
    assert "\ufffd" not in name


def test_a_home_that_no_shell_expanded_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    keys = ("output_path", "perf_dump_path", "image_path")
    settings = read_settings(GenerateSettings, {"prompt": "a", **{key: f"~/{key}" for key in keys}})
    assert [getattr(settings, key) for key in keys] == [f"/home/somebody/{key}" for key in keys]
    assert read_settings(GenerateSettings, {"prompt": "a"}).image_path is None


def test_a_video_that_ffmpeg_cannot_write_is_an_error(tmp_path):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    write_media(tmp_path / "good.mp4", frames, 1000)
    with pytest.raises(ConfigError, match="ffmpeg could not write the video: 2 frames of 16x16 at 999999999999 frames per second"):
        write_media(tmp_path / "bad.mp4", frames, 999999999999)
