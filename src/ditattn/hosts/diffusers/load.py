"""Load a diffusers pipeline from a folder or the hub: safetensors only, no remote code unless allowed, errors in one sentence."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from ditattn.errors import ModelNotLoaded
from ditattn.models import needs_full_precision

__all__ = ["config_of", "load_pipeline", "no_loading_bars", "pipeline_class", "read_index"]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_index(model_path: str, revision: str | None = None) -> dict[str, Any]:
    """The pipeline's `model_index.json`: its class and its components. Reads one small file.

    Args:
        model_path: a folder that `save_pretrained` wrote, or a hub id.
        revision: branch, tag or commit of a hub repository.

    Raises:
        ModelNotLoaded: no such folder (the hub is not asked for what looks like a path), or no pipeline in it.
    """
    path = Path(model_path).expanduser()
    if not path.exists():
        _refuse_missing_path(model_path)
    elif not (path / "model_index.json").is_file():
        raise ModelNotLoaded(f"{model_path} holds no diffusers pipeline: there is no model_index.json in it")
    source = str(path) if path.exists() else model_path
    with _in_one_sentence(model_path):
        return dict(diffusers.DiffusionPipeline.load_config(source, revision=revision))


def config_of(model_path: str, component: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """The `config.json` of a model's component, or of a folder that holds one model. Reads one small file.

    Raises:
        ModelNotLoaded: there is none.
    """
    path = Path(model_path).expanduser()
    with _in_one_sentence(model_path):
        found = diffusers.AutoModel.load_config(str(path) if path.exists() else model_path, subfolder=component, revision=revision)
    return dict(found)


def pipeline_class(index: dict[str, Any]) -> type | None:
    """The pipeline's class; None if diffusers does not have it (then only remote code can tell)."""
    found = getattr(diffusers, str(index.get("_class_name")), None)
    return found if isinstance(found, type) else None


def load_pipeline(
    model_path: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The pipeline, in `dtype`, on `device`. Weights come from safetensors files only, never from pickles.

    Raises:
        ModelNotLoaded: says what is missing or wrong.
    """
    index = read_index(model_path, revision)
    if pipeline_class(index) is None and not trust_remote_code:
        raise ModelNotLoaded(
            f"{model_path} is a {index.get('_class_name')}, which diffusers {diffusers.__version__} does not have; "
            "--trust-remote-code allows the code that comes with a model"
        )
    path = Path(model_path).expanduser()
    with _in_one_sentence(model_path), no_loading_bars():
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(path) if path.exists() else model_path,
            use_safetensors=True,
            revision=revision,
            trust_remote_code=trust_remote_code,
            **{_dtype_keyword(): _dtypes(index, dtype)},
        )
    return pipe.to(device)


def _dtype_keyword() -> str:
    """diffusers 0.42 renamed it."""
    return "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"


def _dtypes(index: dict[str, Any], dtype: torch.dtype) -> torch.dtype | dict[str, torch.dtype]:
    """One dtype, or one for the VAE and one for the rest."""
    vae = index.get("vae")
    keeps = isinstance(vae, (list, tuple)) and needs_full_precision(vae[-1])
    return {"vae": torch.float32, "default": dtype} if keeps and dtype is not torch.float32 else dtype


def _refuse_missing_path(model_path: str) -> None:
    """Raise unless the text can only be a hub id."""
    looks_like_path = not HUB_ID.fullmatch(model_path) or Path(model_path).parts[0] in (".", "..") or Path(model_path).parent.is_dir()
    if looks_like_path:
        raise ModelNotLoaded(f"no such folder: {model_path} (a model on the hub has the form owner/name)")


@contextlib.contextmanager
def _in_one_sentence(model_path: str) -> Iterator[None]:
    """Loading fails in many ways, with long texts: keep the first sentence. Running out of memory is none of them."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        text = " ".join(str(error).split())
        hint = " (only safetensors weights are loaded, never pickles)" if "safetensors" in text else ""
        raise ModelNotLoaded(f"cannot load {model_path}: {text[:400]}{hint}") from error


@contextlib.contextmanager
def no_loading_bars() -> Iterator[None]:
    """Bars for components and weights come and go too quickly to read; downloads keep theirs."""
    logs = [diffusers.utils.logging, transformers.utils.logging]
    on = [log for log in logs if log.is_progress_bar_enabled()]
    for log in on:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in on:
            log.enable_progress_bar()
