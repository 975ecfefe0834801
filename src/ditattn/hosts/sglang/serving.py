"""The attention calls of sglang's denoisers, served by the stage that serves every host.

sglang makes a forward context for every forward of a model: another context is another forward. It knows the step and its number, the
tokens' grid is in the metadata that it builds for a step, and the number of a layer is its place among those that were built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ditattn.backends.registry import load_backend
from ditattn.backends.setting import Setting
from ditattn.hosts.sglang.config import model_prefix, pipeline_config
from ditattn.hosts.sglang.sequences import Latents, ModelSequence, call_tokens, latents_of, sequence_of
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

__all__ = ["Layer", "Serving", "logger", "serving"]

Found = TypeVar("Found")

CACHED_KEYS = "causal attention with more keys than queries"


def logger() -> Any:
    """sglang's logger of this package: its workers show no other ones below warnings."""
    from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

    return init_logger("sglang.multimodal_gen.ditattn")


def _layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """The grids of a request. Raises ValueError where they are not known."""
    latents: Latents | None = arguments["latents"]
    if latents is None:
        raise ValueError("the latents are of a form that is not known here")
    return latents.layout()


def _known(find: Callable[..., Found], *facts: Any) -> Found | None:
    """A form of sglang's that is not known is no error: calls run densely and are counted as "unknown geometry"."""
    try:
        return find(*facts)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        logger().debug("tokens of a call are not known: %s", error)
        return None


FAMILY = ModelFamily(name="sglang", transformer_classes=(), layout=_layout, self_attention=r".*")


@dataclass
class ServedForward:
    """A forward that runs.

    Attributes:
        forward: as the stage knows it.
        sequence: of its model.
        latents: of its request; None where they are not known.
        called: numbers of the layers that were called.
        kind: of the last call: its tokens, the ranks that gathered them, whether they are text alone.
    """

    forward: Forward
    sequence: ModelSequence
    latents: Latents | None
    called: set[int] = field(default_factory=set)
    kind: tuple[int, int, bool] | None = None


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
        self._request: Any = None
        self._context: Any = None
        self._forwards: dict[str, ServedForward] = {}

    def model(self, component: str, setting: Setting) -> ServedModel:
        """The denoiser of that name; a new one where it was served otherwise before."""
        backend = load_backend(setting.config_owner)
        for model in self.stage.models:
            if model.name == component and (model.backend, model.config) == (backend, setting.config):
                return model
        made = ServedModel(component, FAMILY, None, backend, setting.config, [], layers_by_count=False)
        self.stage.models = [*(model for model in self.stage.models if model.name != component), made]
        return made

    @contextlib.contextmanager
    def serves(self, request: Any) -> Iterator[None]:
        """Within a denoising stage of this request. Some stages do not say in a forward's context which it is."""
        before, self._request = self._request, request
        try:
            yield
        finally:
            self._request = before

    def request_of(self, context: Any) -> Any:
        """The request that a forward is for; None where it is no denoiser's."""
        if context is None:
            return None
        if context.forward_batch is None and context.attn_metadata is not None:
            return self._request
        return context.forward_batch

    def attend(self, layer: Layer, context: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One call of a denoiser, `[B, S, H, D]` in and out."""
        served = self._forward(layer, context)
        forward = served.forward
        self.stage.resume(forward)
        forward.layer = layer.number
        self._set_tokens(served, layer, query)
        if layer.causal and query.shape[1] != key.shape[1]:
            # sglang's queries are the last tokens of the keys, ours the first
            self.stage.count_native(forward, query, key, CACHED_KEYS)
            return layer.theirs(query, key, value)
        return self.stage.attend(forward, query, key, value, None, layer.causal, layer.scale)

    def _forward(self, layer: Layer, context: Any) -> ServedForward:
        """The forward that a call belongs to: another context, or a layer that was called already, means another one."""
        if context is not self._context:
            self._leave()
            self._context = context
        name = layer.model.name
        if name in self._forwards and layer.number in self._forwards[name].called:
            self.stage.leave(self._forwards.pop(name).forward)
        if name not in self._forwards:
            self._forwards[name] = self._enter(layer, context)
        self._forwards[name].called.add(layer.number)
        return self._forwards[name]

    def _enter(self, layer: Layer, context: Any) -> ServedForward:
        check_layers(layer.model.config, len(layer.model.layers), layer.model.name)
        request, sequence = self.request_of(context), sequence_of(model_prefix())
        latents = _known(latents_of, sequence, context.attn_metadata, request, pipeline_config())
        step = Step(_index_of_step(context), _num_steps(request), "sglang")
        return ServedForward(self.stage.enter(layer.model, {"latents": latents}, driver=step), sequence, latents)

    def _set_tokens(self, served: ServedForward, layer: Layer, query: Tensor) -> None:
        """Layers of one forward differ in what they see: the text alone, the video alone, both."""
        num_tokens, ranks = query.shape[1], layer.num_heads // query.shape[2]
        kind = num_tokens, ranks, served.sequence.sees_text_alone(layer.path)
        if kind == served.kind:
            return
        served.kind = kind
        tokens = None
        if served.latents is not None:
            tokens = _known(call_tokens, served.sequence, served.latents, layer.path, num_tokens, ranks)
        layout, gathered = (None, None) if tokens is None else tokens
        split, share = None, WHOLE
        if ranks > 1:
            place = _ulysses_rank()
            split, share = SequenceSplit(ranks, 1, place), RankShare(gathered, heads=HeadShare(place, ranks, layer.num_heads))
        self.stage.set_tokens(served.forward, layout, split, share)

    def _leave(self) -> None:
        for served in self._forwards.values():
            self.stage.leave(served.forward)
        self._forwards.clear()
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
        path: as above; "layer N" where sglang does not say.
        number: its place among the layers of the denoiser; a layer that is built again keeps its own.
    """

    def __init__(
        self, model: ServedModel, path: str, num_heads: int, causal: bool, scale: float, theirs: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        self.model, self.num_heads, self.causal, self.scale, self.theirs = model, num_heads, causal, scale, theirs
        if path and sequence_of(model_prefix()).one_prefix:
            path = f"{path}, layer {len(model.layers)}"
        if not path or path not in model.layers:
            model.layers.append(path or f"layer {len(model.layers)}")
            path = model.layers[-1]
        self.path, self.number = path, model.layers.index(path)
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
    if serving().request_of(context) is None:
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
