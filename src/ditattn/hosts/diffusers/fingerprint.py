"""Which weights a model path stands for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub

from ditattn.errors import ModelNotLoaded

__all__ = ["model_fingerprint"]

# larger files are sampled: hashing a model of many GB would take longer than some runs
WHOLE_BYTES = 64 * 2**20
SAMPLE_BYTES = 2**20
NUM_SAMPLES = 16


def model_fingerprint(model_path: str, revision: str | None = None) -> str:
    """A hash of every file: of its whole content up to 64 MiB, beyond that of its size, time of change and 16 samples of 1 MiB.

    Args:
        model_path: a folder, or a hub id whose files were downloaded before.
        revision: branch, tag or commit of a hub repository.

    Raises:
        ModelNotLoaded: neither a folder nor in the hub's cache.
    """
    folder = _folder(model_path, revision)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        _add_content(digest, path)
    return digest.hexdigest()


def _folder(model_path: str, revision: str | None) -> Path:
    path = Path(model_path).expanduser()
    if path.is_dir():
        return path
    index = huggingface_hub.try_to_load_from_cache(model_path, "model_index.json", revision=revision)
    if not isinstance(index, str):
        raise ModelNotLoaded(f"the files of {model_path} are not in the hub's cache, so they cannot be told apart from other versions")
    return Path(index).parent


def _add_content(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return
        # files of the hub's cache are links to blobs that are named by their content
        digest.update(f"{path.resolve().name} {path.stat().st_mtime_ns}".encode())
        for number in range(NUM_SAMPLES):
            file.seek(number * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
