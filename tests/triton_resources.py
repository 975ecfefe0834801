"""What a compiled Triton kernel takes of a GPU, as the disassembler of the triton package reports it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return {"registers": int(found["REG"]), "stack_bytes": int(found["STACK"]), "local_bytes": int(found["LOCAL"])}
