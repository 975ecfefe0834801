"""Dense references on disk, found again only by the very same question."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ditattn.comparison.runs import Run

__all__ = ["ReferenceCache", "reference_key"]

FRAMES, RECORD = "frames.npz", "run.json"

# what numpy and json raise for files that are missing, cut off or altered
DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


def reference_key(facts: Mapping[str, Any]) -> str:
    """A hash of everything that can change the frames or the time of a run; any changed value gives another one.

    Args:
        facts: plain values; images and other bytes as hashes.
    """
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ReferenceCache:
    """Runs by key.

    Args:
        folder: where they are kept; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, facts: Mapping[str, Any]) -> Run | None:
        """The run that these facts describe, or None. A damaged entry counts as absent."""
        place = self.folder / reference_key(facts)
        try:
            record = json.loads((place / RECORD).read_text(encoding="utf-8"))
            with np.load(place / FRAMES) as content:
                frames = content["frames"]
            return Run(frames=frames, **{**record["run"], "cached": True})
        except DAMAGED:
            return None

    def keep(self, facts: Mapping[str, Any], run: Run) -> None:
        """Write a run, whole or not at all. The last one written counts.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        place, draft = self.folder / reference_key(facts), Path(tempfile.mkdtemp(prefix=".draft-", dir=self.folder))
        try:
            np.savez_compressed(draft / FRAMES, frames=run.frames)
            values = {field.name: getattr(run, field.name) for field in fields(run) if field.name != "frames"}
            content = {"facts": facts, "run": values}
            (draft / RECORD).write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
            os.replace(draft, place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
