"""Names of files."""

from __future__ import annotations

import pytest

from ditattn.cli.outputs import Outbox, default_name

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
    with Outbox() as outbox:
        outbox.draft(tmp_path / f"{name}.html").write_text("x")
        outbox.commit()
    assert prompt[:20] in name
    assert "\ufffd" not in name
