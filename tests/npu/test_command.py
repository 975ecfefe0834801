"""`ditattn backends` as a user types it, in a process of its own, with stand-ins for CANN and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def listing(environment: dict[str, str]) -> Any:
    command = [sys.executable, "-m", "ditattn", "backends", "--json", "--device", "npu"]
    inherited = {name: value for name, value in os.environ.items() if name not in ("TORCH_DEVICE_BACKEND_AUTOLOAD", "CANN_STUB_SOC")}
    done = subprocess.run(command, capture_output=True, text=True, env={**inherited, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_with_an_npu(stub_folder: Path) -> None:
    found = listing({"LD_LIBRARY_PATH": str(stub_folder), "CANN_STUB_SOC": "Ascend910_9382"})
    assert found["devices"] == [{"device": "npu", "name": "Ascend910_9382 (A3)", "reason": None}]
    serving = {(row["backend"], row["operation"]): row["implementation"] for row in found["backends"] if row["serves"]}
    assert serving["rain_fusion_attn", "block_sparse_attention"] == "mask_torch_npu"
    assert serving["block_sparse_attn", "block_estimate"] == "estimate_mindiesd"
    assert serving["laser_attn", "dense_attention"] == "laser_mindiesd"
    assert serving["fa", "dense_attention"] == "flash"
    explained = {row["implementation"]: row["reason"] for row in found["backends"] if not row["available"]}
    assert "build sgl-kernel-npu from source" in explained["counted_attentions"]


def test_without_cann() -> None:
    """torch_npu is installed and cannot load: every row says so, and nothing crashes."""
    found = listing({"LD_LIBRARY_PATH": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    assert "torch_npu is installed but does not load" in found["devices"][0]["reason"]
    assert "set_env.sh" in found["devices"][0]["reason"]
    assert not any(row["available"] for row in found["backends"])
