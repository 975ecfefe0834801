"""Dense references on disk, found again only by the very same question."""

from __future__ import annotations

import contextlib
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

from ditattn.compare.run import Run

__all__ = ["ReferenceCache", "facts_digest"]

FRAMES, RECORD = "frames.npz", "run.json"
# about a hundred clips of 81 frames at 832x480
MAX_BYTES = 4 * 2**30

# what numpy and json raise for files that are missing, cut off or altered
DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


def facts_digest(facts: Mapping[str, Any]) -> str:
    """A hash that any changed value changes. `facts` are plain values; images and other bytes as hashes."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ReferenceCache:
    """Runs by key.

    Args:
        folder: where they are kept; made when the first one is written.
        max_bytes: when a new run exceeds them, those that were used longest ago go; the new one stays, whatever its size.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def find(self, facts: Mapping[str, Any]) -> Run | None:
        """The run that these facts describe, or None. A damaged entry counts as absent."""
        place = self.folder / facts_digest(facts)
        try:
            record = json.loads((place / RECORD).read_text(encoding="utf-8"))
            with np.load(place / FRAMES) as content:
                frames = content["frames"]
            found = Run(frames=frames, **{**record["run"], "cached": True})
        except DAMAGED:
            return None
        # the time of its last use; a folder that may be read only keeps the old one
        with contextlib.suppress(OSError):
            os.utime(place)
        return found

    def keep(self, facts: Mapping[str, Any], run: Run) -> None:
        """Write a run, whole or not at all. The last one written counts.

        Raises:
            OSError: the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        place, draft = self.folder / facts_digest(facts), Path(tempfile.mkdtemp(prefix=".draft-", dir=self.folder))
        try:
            np.savez_compressed(draft / FRAMES, frames=run.frames)
            values = {field.name: getattr(run, field.name) for field in fields(run) if field.name != "frames"}
            content = {"facts": facts, "run": values}
            (draft / RECORD).write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
            shutil.rmtree(place, ignore_errors=True)
            os.replace(draft, place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        self._shrink(place)

    def _shrink(self, newest: Path) -> None:
        """Another process may remove entries meanwhile: what is gone counts nothing."""
        entries = [(_last_use(place), place) for place in self.folder.iterdir() if place != newest and not place.name.startswith(".")]
        total = _num_bytes(newest)
        for _, place in sorted(entries, reverse=True):
            total += _num_bytes(place)
            if total > self.max_bytes:
                shutil.rmtree(place, ignore_errors=True)


def _last_use(place: Path) -> float:
    try:
        return place.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _num_bytes(place: Path) -> int:
    try:
        return sum(file.stat().st_size for file in place.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return 0
