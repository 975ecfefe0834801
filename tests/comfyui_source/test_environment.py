"""Whether the rest of this folder runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="ComfyUI is on no package index; COMFYUI_PATH names a checkout")
def test_the_checkout_is_there() -> None:
    assert (Path(os.environ["COMFYUI_PATH"]) / "comfy" / "model_patcher.py").is_file()
