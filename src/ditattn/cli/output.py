"""Files of a run: their names, how pixels become mp4 or png, and that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ditattn.errors import ConfigError

__all__ = ["DraftFiles", "check_file_name", "check_folder", "check_plain_name", "default_name", "numbered", "write_media"]

MEDIA = (".mp4", ".png")
# what somebody who names it expects to get
OTHER_MEDIA = (".avi", ".bmp", ".gif", ".jpeg", ".jpg", ".mkv", ".mov", ".tif", ".tiff", ".webm", ".webp")

# file systems take 255 bytes, not characters; endings, numbers and what marks a draft come on top
NAME_BYTES = 200
PROMPT_BYTES = 100

# visually lossless for most material, and what diffusers' users expect of its size
CRF = 18


def default_name(prompt: str, settings: str) -> str:
    """`<prompt>_<time>_<hash>`, safe on every file system."""
    words = _cut(re.sub(r"[^\w-]+", "_", prompt), PROMPT_BYTES).strip("_") or "prompt"
    digest = hashlib.sha256(f"{prompt}{settings}".encode()).hexdigest()[:8]
    return f"{words}_{time.strftime('%Y%m%d-%H%M%S')}_{digest}"


def _cut(text: str, num_bytes: int) -> str:
    """The longest beginning of `text` that takes no more than `num_bytes` in UTF-8."""
    return text.encode()[:num_bytes].decode(errors="ignore")


def check_file_name(name: str, suffix: str) -> str:
    """The name without its ending.

    Raises:
        ConfigError: as `check_plain_name`, or an ending that does not fit what will be made.
    """
    check_plain_name(name)
    ending = Path(name).suffix.lower()
    if ending in (*MEDIA, *OTHER_MEDIA) and ending != suffix:
        raise ConfigError(f"--output-file-name '{name}' ends in {ending}, but the result is a {suffix} file")
    return name[: -len(ending)] if ending in MEDIA else name


def check_plain_name(name: str) -> None:
    """Raise ConfigError if the name is empty, has folders in it, or is longer than file systems take."""
    if not name.strip():
        raise ConfigError("--output-file-name is empty: leave it out, and the prompt, the time and a hash make the name")
    if Path(name).name != name or name in (".", "..") or "\0" in name:
        raise ConfigError(f"--output-file-name '{name}' must be a plain name; the folder is --output-path")
    if (num_bytes := len(name.encode())) > NAME_BYTES:
        raise ConfigError(f"--output-file-name takes {num_bytes} bytes; file systems take no more than {NAME_BYTES} and the endings")


def check_folder(folder: Path, called: str) -> None:
    """Raise ConfigError unless files can be written to `folder`, which may still have to be made. Checked before hours of work."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"{called}: {place} is not a folder")
    try:
        # tried, since root may do everything where nothing can be made, and network shares allow less than they say
        os.rmdir(tempfile.mkdtemp(prefix=".ditattn-", dir=place))
    except OSError as error:
        raise ConfigError(f"{called}: cannot write to {place} ({error.strerror})") from None


def numbered(path: Path, number: int, count: int) -> Path:
    """`path`, or with several results `path` with `-1`, `-2`, ... before its ending."""
    return path if count == 1 else path.with_name(f"{path.stem}-{number + 1}{path.suffix}")


class DraftFiles:
    """Files are written under hidden names beside their final ones and renamed together by `commit`.

    Leaving the block without a commit, for whatever reason, removes them and the folders that were made for them.
    """

    def __init__(self) -> None:
        self._drafts: list[tuple[Path, Path]] = []
        self._renamed: list[Path] = []
        self._folders: list[Path] = []
        self._done = False

    def draft(self, path: Path) -> Path:
        """Where to write what will become `path`."""
        self._make_folder(path.parent)
        draft = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
        self._drafts.append((draft, path))
        return draft

    def commit(self) -> None:
        """Rename every draft, in the order they were made."""
        for draft, path in self._drafts:
            draft.replace(path)
            self._renamed.append(path)
        self._done = True

    def _make_folder(self, folder: Path) -> None:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        for place in reversed(missing):
            place.mkdir(exist_ok=True)
            self._folders.append(place)

    def __enter__(self) -> DraftFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._done:
            return
        for path in [*self._renamed, *(draft for draft, _ in self._drafts)]:
            path.unlink(missing_ok=True)
        for folder in reversed(self._folders):
            # somebody else may have put something there meanwhile
            with contextlib.suppress(OSError):
                folder.rmdir()


def write_media(path: Path, frames: np.ndarray[Any, Any], fps: int | None) -> None:
    """Write `[F, H, W, 3]` uint8 as h264 (`.mp4`) or, one frame, as `.png`. Sizes are kept."""
    if path.suffix == ".png":
        from PIL import Image

        Image.fromarray(frames[0]).save(path)
        return
    assert fps is not None
    _write_h264(path, frames, fps)


def _write_h264(path: Path, frames: np.ndarray[Any, Any], fps: int) -> None:
    import imageio_ffmpeg

    height, width = frames[0].shape[:2]
    # 4:2:0 halves both axes; odd sizes keep full colour instead of being rescaled
    pixel_format = "yuv444p" if height % 2 or width % 2 else "yuv420p"
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec="libx264",
        pix_fmt_out=pixel_format,
        macro_block_size=1,
        quality=None,
        output_params=["-crf", str(CRF), "-movflags", "+faststart"],
        ffmpeg_log_level="error",
    )
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(frame).tobytes())
    finally:
        writer.close()
    # ffmpeg's exit status goes lost on the way
    if not path.is_file():
        raise ConfigError(f"ffmpeg could not write the video: {len(frames)} frames of {width}x{height} at {fps} frames per second")
