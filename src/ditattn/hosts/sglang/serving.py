"""The attention calls of sglang's denoisers, served by the stage that serves every host.

sglang makes a forward context for every forward of a model: another context is another forward. It knows the step and its number, the
tokens' grid is in the metadata that it builds for a step, and the number of a layer is its place among those that were built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ditattn.backends.registry import load_backend
from ditattn.backends.setting import Setting
from ditattn.hosts.sglang.config import model_prefix
from ditattn.models import ModelFamily, TokenLayout
from ditattn.ops.contract import refuse_gradients
from ditattn.plan.split import HeadShare
from ditattn.runtime.autocast import autocast_as_sdpa
from ditattn.runtime.forward import Forward
from ditattn.runtime.metadata import check_layers
from ditattn.runtime.report import AttentionReport
from ditattn.runtime.served_model import ServedModel
from ditattn.runtime.split import WHOLE, RankShare, SequenceSplit
from ditattn.runtime.stage import DenoisingStage
from ditattn.runtime.step import Step, StepClock

__all__ = ["Layer", "Serving", "logger", "serving", "watch_requests"]

END_OF_A_STAGE = "sglang.multimodal_gen.runtime.pipelines_core.stages.base.PipelineStage.__call__"

# models whose text stands behind the video, by the prefix of their configuration; of others only the video is known
TEXT_BEHIND_VIDEO = frozenset({"hunyuan"})

CACHED_KEYS = "causal attention with more keys than queries"


def logger() -> Any:
    """sglang's logger of this package: its workers show no other ones below warnings."""
    from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

    return init_logger("sglang.multimodal_gen.ditattn")


def _layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """The video of a step's metadata.

    Raises:
        ValueError: no metadata, latents of another form, or gathered tokens of a model with text.
    """
    metadata = arguments["metadata"]
    shape = getattr(metadata, "raw_latent_shape", None)
    if shape is None:
        raise ValueError("sglang built no metadata for this step")
    if arguments["has_text"] and arguments["is_split"]:
        raise ValueError("where the text of gathered tokens stands is not known")
    batch, channels, *sizes = (int(size) for size in shape)
    frames, rows, columns = sizes if len(sizes) == 3 else (1, *sizes)
    patch = tuple(metadata.patch_size)
    return TokenLayout((batch, channels, frames, rows, columns), (1, *patch[1:]) if len(sizes) == 2 else patch)


FAMILY = ModelFamily(name="sglang", transformer_classes=(), layout=_layout, self_attention=r".*")


class RequestClock(StepClock):
    """sglang says which step runs; nothing is guessed."""

    def read(self, cache_context: Any, branch: str | None, timestep: Any, driver: Any = None) -> Step:
        assert isinstance(driver, Step)
        return driver


class Serving:
    """What one process serves: its denoisers, and the forwards that run.

    Attributes:
        stage: serves the calls.
        last_report: of the last denoising stage that ended with calls; None before that.
    """

    def __init__(self) -> None:
        self.stage = DenoisingStage(RequestClock())
        self.last_report: AttentionReport | None = None
        self._context: Any = None
        self._forwards: dict[str, Forward] = {}
        self._called: dict[str, set[int]] = {}

    def model(self, component: str, setting: Setting) -> ServedModel:
        """The denoiser of that name; a new one where it was served otherwise before."""
        backend = load_backend(setting.config_owner)
        for model in self.stage.models:
            if model.name == component and (model.backend, model.config) == (backend, setting.config):
                return model
        family = replace(FAMILY, suffix_varies=model_prefix() in TEXT_BEHIND_VIDEO)
        made = ServedModel(component, family, None, backend, setting.config, [], layers_by_count=False)
        self.stage.models = [*(model for model in self.stage.models if model.name != component), made]
        return made

    def attend(self, layer: Layer, context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One call of a denoiser, `[B, S, H, D]` in and out."""
        forward = self._forward(layer, context, query)
        self.stage.resume(forward)
        forward.layer = layer.number
        if layer.causal and query.shape[1] != key.shape[1]:
            # sglang's queries are the last tokens of the keys, ours the first
            self.stage.count_native(forward, query, key, CACHED_KEYS)
            return layer.theirs(query, key, value)
        return self.stage.attend(forward, query, key, value, None, layer.causal, layer.scale)

    def _forward(self, layer: Layer, context: Any, query: Tensor) -> Forward:
        """The forward that a call belongs to: another context, or a layer that was called already, means another one."""
        if context is not self._context:
            self._leave()
            self._context = context
        name = layer.model.name
        called = self._called.setdefault(name, set())
        if name not in self._forwards or layer.number in called:
            if name in self._forwards:
                self.stage.leave(self._forwards.pop(name))
            called.clear()
            self._forwards[name] = self._enter(layer, context, query)
        called.add(layer.number)
        return self._forwards[name]

    def _enter(self, layer: Layer, context: Any, query: Tensor) -> Forward:
        check_layers(layer.model.config, len(layer.model.layers), layer.model.name)
        ranks = layer.num_heads // query.shape[2]
        arguments = {"metadata": context.attn_metadata, "has_text": layer.model.family.suffix_varies, "is_split": ranks > 1}
        split, share = None, WHOLE
        if ranks > 1:
            place = _ulysses_rank()
            split, share = SequenceSplit(ranks, 1, place), RankShare(heads=HeadShare(place, ranks, layer.num_heads))
        step = Step(_index_of_step(context), _num_steps(context.forward_batch), "sglang")
        return self.stage.enter(layer.model, arguments, driver=step, split=split, share=share)

    def _leave(self) -> None:
        for forward in self._forwards.values():
            self.stage.leave(forward)
        self._forwards.clear()
        self._called.clear()
        self._context = None

    def end_of_stage(self) -> AttentionReport | None:
        """A denoising stage of a request ended: what ran in it, None if nothing of it was served here; counting begins anew."""
        self._leave()
        report = self.stage.report()
        self.stage.reset()
        for model in self.stage.models:
            model.begin_log()
        if not any(component.calls for component in report.components.values()):
            return None
        self.last_report = report
        return report


@cache
def serving() -> Serving:
    """What this process serves."""
    return Serving()


class Layer:
    """One self-attention layer of a denoiser.

    Args:
        model: the denoiser.
        path: of the layer in the model; empty where sglang does not say.
        num_heads: query heads of the layer in this process, before ranks exchange tokens for heads.
        causal, scale: of its calls.
        theirs: what serves calls outside of a denoiser's forward.

    Attributes:
        number: its place among the layers of the denoiser; a layer that is built again keeps its own.
    """

    def __init__(
        self, model: ServedModel, path: str, num_heads: int, causal: bool, scale: float, theirs: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        self.model, self.num_heads, self.causal, self.scale, self.theirs = model, num_heads, causal, scale, theirs
        if not path or path not in model.layers:
            model.layers.append(path or f"layer {len(model.layers)}")
            path = model.layers[-1]
        self.number = model.layers.index(path)
        number = next(_handles)
        _layers[number] = self
        # a tensor: torch.compile would make one graph for each number. sglang builds its models on the meta device
        with torch.inference_mode(False):
            self._handle = torch.tensor(number, device="cpu")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`[B, S, H, D]` in and out, as one operation to torch.compile: step, grid and layer are read inside it."""
        query, key, value, _ = autocast_as_sdpa(query, key, value, None)
        out: Tensor = _attend(query, key, value, self._handle)
        return out


_handles = count()
_layers: WeakValueDictionary[int, Layer] = WeakValueDictionary()


@torch.library.custom_op("ditattn::attend_sglang", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, handle: Tensor) -> Tensor:
    layer, context = _layers[int(handle)], _forward_context()
    if context is None or context.forward_batch is None:
        return layer.theirs(query, key, value).contiguous()
    return serving().attend(layer, context, query, key, value).contiguous()


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, handle: Tensor) -> Tensor:
    return query.new_empty(query.shape)


_attend.register_autograd(refuse_gradients)


def _forward_context() -> Any:
    from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context_or_none

    return get_forward_context_or_none()


def _ulysses_rank() -> int:
    from sglang.multimodal_gen.runtime.distributed.parallel_state import get_ulysses_parallel_rank

    return int(get_ulysses_parallel_rank())


def _index_of_step(context: Any) -> int | None:
    """What the metadata say; stages that build none may count in timesteps or not at all."""
    said = context if context.attn_metadata is None else context.attn_metadata
    return said.current_timestep if isinstance(said.current_timestep, int) else None


def _num_steps(batch: Any) -> int | None:
    """Steps of the request's schedule."""
    timesteps = getattr(batch, "timesteps", None)
    known = getattr(batch, "num_inference_steps", None) if timesteps is None else len(timesteps)
    return None if known is None else int(known)


def watch_requests() -> None:
    """Log what ran at the end of every denoising stage: sglang runs each stage of a request by `PipelineStage.__call__`, which no stage
    replaces."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    if not any(hook is report_of_stage for _, hook, _ in HookRegistry._hooks.get(END_OF_A_STAGE, ())):
        HookRegistry.register(END_OF_A_STAGE, report_of_stage, HookType.AFTER)
    HookRegistry.apply_hooks()


def report_of_stage(result: Any, stage: Any, batch: Any, server_args: Any) -> None:
    """sglang's stage ended; `result` stays what it is."""
    from sglang.multimodal_gen.runtime.disaggregation.roles import RoleType

    if stage.role_affinity != RoleType.DENOISER:
        return
    report = serving().end_of_stage()
    if report is not None and not getattr(batch, "is_warmup", False):
        logger().info(report.summary())
