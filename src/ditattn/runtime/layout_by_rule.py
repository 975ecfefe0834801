"""Where the tokens of a denoiser stand that nobody described: found by dry runs of its own forward, never assumed.

In a dry run every self-attention call is shown here and answered with zeros, so that no token hears of another one. Then a change of one
patch of the latents moves the query, key and value of its own token alone, and changing all patches whose number has a given bit set tells
that bit of the number of every token. Two such runs for each bit (one for the patches without it) show exactly which patch each token is.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models import TokenLayout
from ditattn.models.unlisted import BY_RULE, GridReading, described, grid_readings, latents_of, pattern_of
from ditattn.runtime.dry_run import dry_run
from ditattn.runtime.forward import Forward
from ditattn.runtime.served_model import ServedModel

__all__ = ["LayoutByRule"]

logger = logging.getLogger("ditattn")

ARGUMENTS = (Tensor, int, float, str, type(None), torch.dtype, torch.device)
# rows of a tensor whose bits are summed at a time
ROWS = 4096
# a pipeline has a few kinds of forwards: two branches, two sizes of text
MOST_KINDS = 32


class _NotSure(ValueError):
    """Where the tokens stand could not be seen."""


class _Enough(Exception):
    """A dry run has shown what was asked; nobody outside sees this."""


class _Found(NamedTuple):
    """The layout, the numbers of the layers that have these tokens, and of those that see the grid alone although others do not."""

    layout: TokenLayout
    layers: frozenset[int] = frozenset()
    image_layers: frozenset[int] = frozenset()


class _Seen(NamedTuple):
    """Sums of the bits of one call's tokens, int64 `[3, B, S]`: of query, key and value."""

    sums: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, tokens)."""
        return self.sums.shape[1], self.sums.shape[2]

    def moved_since(self, before: _Seen) -> Tensor:
        """bool `[3 * B, S]`."""
        return (self.sums != before.sums).flatten(0, 1)


class LayoutByRule:
    """The `layout` of a family by rule.

    Args:
        module: the denoiser.
        why_no_dry_run: says why its forward must not run beside the pipeline's own calls, or None.
    """

    def __init__(self, module: nn.Module, why_no_dry_run: Callable[[], str | None]) -> None:
        self._module = weakref.ref(module)
        self._why_no_dry_run = why_no_dry_run
        self._verdicts: dict[Hashable, _Found | str] = {}
        self._told: set[str] = set()
        self.model: ServedModel | None = None

    def __call__(self, config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
        """The layout of a forward with these arguments.

        Raises:
            ValueError: it is not certain; says why.
        """
        assert self.model is not None
        if not self.model.backend.is_sparse:
            raise ValueError("a dense backend needs no layout")
        kind = _kind(arguments)
        if kind not in self._verdicts:
            if len(self._verdicts) == MOST_KINDS:
                self._verdicts.clear()
            self._verdicts[kind] = self._verdict(self.model, config, arguments)
        verdict = self._verdicts[kind]
        if isinstance(verdict, str):
            raise ValueError(verdict)
        self.model.image_layers = verdict.image_layers
        return verdict.layout

    def _verdict(self, model: ServedModel, config: Any, arguments: Mapping[str, Any]) -> _Found | str:
        module = self._module()
        assert module is not None
        try:
            name, latents = latents_of(arguments)
            readings = list(grid_readings(config, module, latents))
            try:
                reading, found = self._verified(module, model, arguments, name, readings)
            except _NotSure as error:
                layout = _assumed(model, latents, readings, error)
                self._say(model, f"its tokens are assumed to be {_named(layout)} in raster order, as you asked: {error}")
                return _Found(layout)
        except ValueError as error:
            self._say(model, f"its calls run densely: {error}")
            return str(error)
        text = arguments.get("encoder_hidden_states")
        self_attention = pattern_of({model.layers[layer] for layer in found.layers}, {path for path, _ in module.named_modules()})
        text = text if isinstance(text, Tensor) else None
        start = described(model.family, reading, name, found.layout, text, self_attention)
        self._say(model, f"its tokens are {_named(found.layout)} in raster order, as dry runs showed", start)
        return found

    def _say(self, model: ServedModel, what: str, start: str = "") -> None:
        """Once for each thing to say."""
        model.log.model = f"{model.family.transformer_classes[0]}, {BY_RULE}: {what}"
        if what not in self._told:
            self._told.add(what)
            more = f". A file for its family may start so (see docs/adding_a_backend.md):\n{start}" if start else ""
            logger.warning("%s: %s%s", model.name, model.log.model, more)

    def _verified(
        self, module: nn.Module, model: ServedModel, arguments: Mapping[str, Any], name: str, readings: list[GridReading]
    ) -> tuple[GridReading, _Found]:
        """The reading of the latents that is true, and the layout.

        Raises:
            _NotSure: it cannot be seen.
            ValueError: no reading is true.
        """
        reason = self._why_no_dry_run()
        if reason is not None:
            raise _NotSure(reason)
        runs = _DryRuns(module, model, arguments, name)
        try:
            # of what is compiled the Python code runs: graphs that are kept for the pipeline must not meet a dry run
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), _random_state_kept(runs.latents.device):
                return _verified(runs, readings)
        except ValueError:
            raise
        except (RuntimeError, TypeError, KeyError, IndexError, AttributeError, AssertionError, NotImplementedError) as error:
            raise _NotSure(f"a dry run of its forward ended in {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _random_state_kept(device: torch.device) -> Any:
    on_device = device.type != "cpu"
    return torch.random.fork_rng([device] if on_device else [], device_type=device.type if on_device else "cuda")


def _named(layout: TokenLayout) -> str:
    grid = " x ".join(map(str, layout.grid))
    beside = [f"{layout.num_prefix_tokens} before"] * bool(layout.num_prefix_tokens)
    beside += [f"{layout.num_suffix_tokens} behind"] * bool(layout.num_suffix_tokens)
    return f"a grid of {grid}" + (f" ({' and '.join(beside)} it are kept whole)" if beside else "")


def _assumed(model: ServedModel, latents: Tensor, readings: list[GridReading], why: ValueError) -> TokenLayout:
    """The likeliest layout of a sequence that is the grid alone, where that may be assumed; another length runs densely in every call."""
    if not getattr(model.config, "assume_layout", False):
        raise ValueError(f"{why} (assume_layout=true takes the sequence for the grid of its latents where their lengths agree)") from why
    if not readings:
        raise ValueError(f"{why}, and latents {tuple(latents.shape)} are no whole number of patches") from why
    return readings[0].layout(latents)


class _DryRuns:
    """Forwards whose attention is watched, with the pipeline's arguments but for the latents."""

    def __init__(self, module: nn.Module, model: ServedModel, arguments: Mapping[str, Any], name: str) -> None:
        signature = inspect.signature(type(module).forward)
        kinds = {one.name: one.kind for one in signature.parameters.values()}
        collecting = [one for one, kind in kinds.items() if kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)]
        self._arguments = {key: value for key, value in arguments.items() if value is not module and key not in collecting}
        if any(kinds[key] is inspect.Parameter.VAR_POSITIONAL and arguments.get(key) for key in collecting):
            raise _NotSure("arguments of its forward have no names")
        for key, value in self._arguments.items():
            _check_argument(key, value)
        self.module, self._model, self._name, self.paths = module, model, name, model.layers
        self.latents: Tensor = arguments[name]
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(self.latents.shape, generator=generator).to(self.latents)
        self._other = self.latents + noise * (1 + self.latents.abs().amax())

    def run(self, changed: Tensor | None = None, until: int | None = None) -> dict[int, _Seen]:
        """What calls over as many keys as queries showed, by layer, in the order in which they ran.

        Args:
            changed: bool, broadcastable to the latents: where they are changed.
            until: the layer behind which the run ends.

        Raises:
            _NotSure: a layer makes several such calls.
        """
        seen: dict[int, _Seen] = {}

        def look(forward: Forward, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            layer = forward.layer
            if layer is not None and query.shape[:2] == key.shape[:2]:
                if layer in seen:
                    raise _NotSure(f"{self.paths[layer]} makes several calls in one forward")
                seen[layer] = _Seen(torch.stack([_sums(x) for x in (query, key, value)]))
                if layer == until:
                    raise _Enough
            return torch.zeros_like(query)

        latents = self.latents if changed is None else torch.where(changed, self._other, self.latents)
        arguments = {key: _copied(value) for key, value in self._arguments.items()}
        try:
            with dry_run(self._model, look):
                self.module.forward(**{**arguments, self._name: latents})
        except _Enough:
            pass
        return seen


def _check_argument(name: str, value: Any) -> None:
    """Raise _NotSure for what a forward could leave changed."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    for part in parts:
        _check_argument(name, part)
    if not isinstance(value, (*ARGUMENTS, Mapping, list, tuple)):
        raise _NotSure(f"its argument {name} is a {type(value).__name__}, which a dry run might change")


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if type(value) is list else value


def _sums(x: Tensor) -> Tensor:
    """int64 `[B, S]`: a weighted sum of the bits of each token's elements, equal where all are."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    tokens = x.flatten(2)
    # odd numbers: no change of a single element is lost
    weights = torch.arange(tokens.shape[2], device=x.device) * 0x9E3779B1 * 2 + 1
    parts = [(part.contiguous().view(words).long() * weights).sum(-1) for part in tokens.split(ROWS, dim=1)]
    return torch.cat(parts, dim=1)


def _verified(runs: _DryRuns, readings: list[GridReading]) -> tuple[GridReading, _Found]:
    before = runs.run()
    every = torch.ones((), dtype=torch.bool, device=runs.latents.device)
    layer, start, stop = _grid_tokens(runs, before, runs.run(every))
    length = before[layer].shape[1]
    found = [one for one in readings if one.layout(runs.latents).num_video_tokens == stop - start]
    if not found:
        raise _NotSure(f"its latents move {stop - start} of {length} tokens, and by no known patch are they as many")
    doubts: list[ValueError] = []
    for reading in found:
        layout = reading.layout(runs.latents, start, length - stop)
        try:
            _check_places(runs, before[layer], layer, reading, layout)
            return reading, _Found(layout, *_checked_layers(runs, before, layer, reading, layout))
        except ValueError as error:
            doubts.append(error)
    # one that is refuted tells more than one that cannot be seen
    raise next((doubt for doubt in doubts if not isinstance(doubt, _NotSure)), doubts[0])


def _grid_tokens(runs: _DryRuns, before: dict[int, _Seen], after: dict[int, _Seen]) -> tuple[int, int, int]:
    """The first of the layers that most are like, and the first and last token + 1 that the latents move there."""
    batch = runs.latents.shape[0]
    moved = {
        layer: after[layer].moved_since(before[layer]) for layer in before if layer in after and after[layer].shape == before[layer].shape
    }
    kinds: Counter[tuple[Hashable, ...]] = Counter()
    places: dict[tuple[Hashable, ...], int] = {}
    for layer, mask in moved.items():
        if not mask.any():
            continue
        kind = (
            before[layer].shape,
            bool((mask == mask[:1]).all()),
            tuple(mask[0].nonzero().flatten()[[0, -1]].tolist() if mask[0].any() else ()),
        )
        kinds[kind] += 1
        places.setdefault(kind, layer)
    if not kinds:
        raise ValueError("no self-attention of it has as many queries as keys of its latents")
    layer = places[kinds.most_common(1)[0][0]]
    mask, (sequences, length) = moved[layer], before[layer].shape
    if sequences != batch:
        raise ValueError(f"its attention runs within parts of the grid: {sequences} sequences of {length} tokens for a batch of {batch}")
    if not torch.equal(mask, mask[:1].expand_as(mask)):
        raise ValueError("its queries and keys are not of one source: the latents move other tokens of the one than of the other")
    tokens = mask[0].nonzero().flatten()
    start, stop = int(tokens[0]), int(tokens[-1]) + 1
    if len(tokens) != stop - start:
        raise ValueError(f"the {len(tokens)} tokens that its latents move do not stand together among the {length}")
    return layer, start, stop


def _patches(reading: GridReading, layout: TokenLayout, chosen: Tensor) -> Tensor:
    """Which latents belong to the chosen patches, bool `[F, Y, X]`, in the axes of the latents."""
    for axis, size in enumerate(layout.patch_size):
        chosen = chosen.repeat_interleave(size, dim=axis)
    shape = [chosen.shape["FYX".index(axis)] if axis in "FYX" else 1 for axis in reading.axes]
    return chosen.reshape(shape)


def _check_places(runs: _DryRuns, before: _Seen, layer: int, reading: GridReading, layout: TokenLayout) -> None:
    """Raise unless token i of the grid is patch i, by the bits of i."""
    numbers = torch.arange(layout.num_video_tokens, device=runs.latents.device)
    for bit in range(max(layout.num_video_tokens - 1, 1).bit_length()):
        with_bit = (numbers >> bit) % 2 == 1
        masks = [_moved(runs, before, layer, reading, layout, chosen) for chosen in (with_bit, ~with_bit)]
        if bool((masks[0] & masks[1]).any()):
            raise _NotSure("before its first attention a token hears of several patches of the latents")
        if not all(
            torch.equal(mask, _expected(layout, chosen).expand_as(mask)) for mask, chosen in zip(masks, (with_bit, ~with_bit), strict=True)
        ):
            raise ValueError(f"its tokens do not stand in raster order of {' x '.join(map(str, layout.grid))}")


def _checked_layers(
    runs: _DryRuns, before: dict[int, _Seen], first: int, reading: GridReading, layout: TokenLayout
) -> tuple[frozenset[int], frozenset[int]]:
    """Raise unless the tokens of every layer with as many stand as those of the first. Returns all that agree, and those without text."""
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(layout.num_video_tokens, generator=generator).lt(0.5).to(runs.latents.device)
    after = runs.run(_patches(reading, layout, chosen.view(layout.grid)))
    alone, layers, image_layers = layout.without_text(), set(), set()
    for layer, seen in before.items():
        expected = {alone.num_tokens: alone, layout.num_tokens: layout}.get(seen.shape[1])
        if expected is None:
            continue
        agrees = layer in after and after[layer].shape == seen.shape and seen.shape[0] == before[first].shape[0]
        if agrees:
            mask = after[layer].moved_since(seen)
            agrees = torch.equal(mask, _expected(expected, chosen).expand_as(mask))
        if not agrees and expected is layout:
            raise ValueError(f"the tokens of {runs.paths[layer]} do not stand as those of {runs.paths[first]}")
        if agrees:
            layers.add(layer)
        if agrees and expected is alone:
            image_layers.add(layer)
    return frozenset(layers), frozenset(image_layers)


def _moved(runs: _DryRuns, before: _Seen, layer: int, reading: GridReading, layout: TokenLayout, chosen: Tensor) -> Tensor:
    """bool `[3 * B, S]`: which tokens the chosen patches move in a layer."""
    after = runs.run(_patches(reading, layout, chosen.view(layout.grid)), until=layer)
    if layer not in after or after[layer].shape != before.shape:
        raise _NotSure("how many tokens it has depends on what the latents are")
    return after[layer].moved_since(before)


def _expected(layout: TokenLayout, chosen: Tensor) -> Tensor:
    """bool `[S]`: the chosen tokens of the grid."""
    mask = torch.zeros(layout.num_tokens, dtype=torch.bool, device=chosen.device)
    mask[layout.num_prefix_tokens : layout.num_prefix_tokens + layout.num_video_tokens] = chosen
    return mask


# a pipeline passes the same masks in every step: reading them costs a device synchronisation, once per run
_values: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _kind(arguments: Mapping[str, Any]) -> Hashable:
    """Forwards of one kind have their tokens in the same places: shapes, numbers, and what masks and other whole numbers are."""
    return tuple((name, _kind_of(name, value)) for name, value in arguments.items() if not isinstance(value, nn.Module))


def _kind_of(name: str, value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return tuple((key, _kind_of(f"{name}.{key}", part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_kind_of(name, part) for part in value)
    if not isinstance(value, Tensor):
        return value if isinstance(value, (bool, int, str, type(None))) else type(value).__name__
    facts = (tuple(value.shape), value.dtype, value.device)
    if "timestep" in name or (value.is_floating_point() and "mask" not in name):
        return facts
    if value not in _values:
        _values[value] = hash(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else value.item())
    return (*facts, _values[value])
