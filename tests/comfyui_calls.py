"""Calls that ComfyUI makes of a node's wrappers and attention override: recorded from its own models, and made again without it.

`comfyui_calls.json` holds, for one forward of a tiny model of each family, the class, the attributes that a layout reads, the forward's
arguments by shape, and every attention call by shape and form. `tests/comfyui_source` records them anew where ComfyUI is, and compares.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

FILE = Path(__file__).with_suffix(".json")
ATTRIBUTES = ("patch_size", "ref_conv", "byt5_in")
SCHEDULE = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def recordings() -> dict[str, Any]:
    """By family."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def plain(value: Any) -> Any:
    """What of an argument is written down: the shape of a tensor, a plain value as it is, of anything else its type."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else {"type": type(value).__name__}


def of_plain(value: Any, generator: torch.Generator) -> Any:
    """A value of that form."""
    if isinstance(value, dict) and "shape" in value:
        return torch.randn(value["shape"], generator=generator).to(getattr(torch, value["dtype"]))
    if isinstance(value, list):
        return [of_plain(one, generator) for one in value]
    return None if isinstance(value, dict) else value


def recorded_forward(model: Any, arguments: dict[str, Any], calls: list[dict[str, Any]]) -> dict[str, Any]:
    """One forward as it is written down."""
    attributes = {name: plain(getattr(model, name)) for name in ATTRIBUTES if hasattr(model, name)}
    if hasattr(model, "patchifier"):
        attributes["patchifier.patch_size"] = list(model.patchifier.patch_size)
    given = {name: plain(value) for name, value in arguments.items() if name != "transformer_options"}
    return {"class": type(model).__name__, "attributes": attributes, "forward": given, "calls": calls}


def recorded_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """One attention call as it is written down, arguments by place and by name apart."""
    named = {name: plain(value) for name, value in kwargs.items() if name != "transformer_options"}
    return {"args": [plain(value) for value in args], "kwargs": named, "has_options": "transformer_options" in kwargs}


class Patcher:
    """What nodes need of ComfyUI's ModelPatcher: options that clones copy deeply, and wrappers by place and key."""

    def __init__(self, device: str = "cpu") -> None:
        self.load_device = torch.device(device)
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        # by the name of their class; clones have the same
        self.models: dict[str, Any] = {}

    def clone(self) -> Patcher:
        made = Patcher()
        made.load_device = self.load_device
        made.models = self.models
        made.model_options = copy.deepcopy(self.model_options)
        made.wrappers = {place: {key: list(found) for key, found in by_key.items()} for place, by_key in self.wrappers.items()}
        return made

    def add_wrapper_with_key(self, place: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(place, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, place: str, key: str) -> None:
        self.wrappers.get(place, {}).pop(key, None)

    def around(self, place: str) -> list[Any]:
        return [wrapper for found in self.wrappers.get(place, {}).values() for wrapper in found]


class Executor:
    """As ComfyUI hands it to a wrapper: calling it goes on."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Any]) -> None:
        self.original, self.class_obj, self._wrappers = original, class_obj, wrappers

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrappers[0](self, *args, **kwargs) if self._wrappers else self.original(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Executor(self.original, self.class_obj, self._wrappers[1:]).execute(*args, **kwargs)


def native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """ComfyUI's attention by torch's SDPA, in all its forms."""
    if not skip_reshape:
        head_size = q.shape[-1] // heads
        q, k, v = (x.unflatten(-1, (-1, head_size)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"), enable_gqa=kwargs.get("enable_gqa", False))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def attention(options: dict[str, Any] | None, *args: Any, **kwargs: Any) -> Tensor:
    """A call as ComfyUI's models make it."""
    if options is None:
        return native(*args, **kwargs)
    kwargs = {**kwargs, "transformer_options": options, "_inside_attn_wrapper": True}
    override = options.get("optimized_attention_override")
    result: Tensor = native(*args, **kwargs) if override is None else override(native, *args, **kwargs)
    return result


def sampling(patcher: Patcher, run: Callable[[], Any]) -> Any:
    """A sampling: what a sampler does runs inside the wrappers around it."""
    return Executor(lambda: run(), None, patcher.around("outer_sample")).execute()


def _model(recording: dict[str, Any], generator: torch.Generator) -> Any:
    attributes = {name: of_plain(value, generator) for name, value in recording["attributes"].items() if "." not in name}
    if "patchifier.patch_size" in recording["attributes"]:
        attributes["patchifier"] = type("Patchifier", (), {"patch_size": tuple(recording["attributes"]["patchifier.patch_size"])})
    return type(recording["class"], (), attributes)()


def forward(patcher: Patcher, recording: dict[str, Any], sigma: float, seed: int = 0, **options: Any) -> list[Tensor]:
    """A recorded forward on random tensors: the answers of its attention calls."""
    generator = torch.Generator().manual_seed(seed)
    model = patcher.models.setdefault(recording["class"], _model(recording, generator))
    arguments = {name: of_plain(value, generator) for name, value in recording["forward"].items()}
    given = {**patcher.model_options["transformer_options"], "sigmas": torch.tensor([sigma]), "sample_sigmas": SCHEDULE, **options}
    calls = [([of_plain(a, generator) for a in call["args"]], call) for call in recording["calls"]]

    def original(**named: Any) -> list[Tensor]:
        found = []
        for args, call in calls:
            kwargs = {name: of_plain(value, generator) for name, value in call["kwargs"].items() if name != "_inside_attn_wrapper"}
            found.append(attention(named["transformer_options"] if call["has_options"] else None, *args, **kwargs))
        return found

    executor = Executor(original, model, patcher.around("diffusion_model"))
    result: list[Tensor] = executor.execute(**arguments, transformer_options=given)
    return result
