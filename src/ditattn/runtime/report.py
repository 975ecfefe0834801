"""What really ran: counts, reasons, densities and time, per component of a pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ditattn.backends.base import CallRecord
from ditattn.devices.clock import Stopwatch
from ditattn.plan.token_grids import grid_name

__all__ = ["AttentionReport", "ComponentLog", "ComponentReport"]

# begins `split` of a report that several ranks' reports were put together to
ALL_RANKS = "all "


@dataclass
class Cell:
    """Calls of one step and layer. Densities stay on the device until somebody asks.

    Attributes:
        density_sum: of the sparse calls.
        beside_sum: of the plans that ran beside dense calls.
    """

    sparse: int = 0
    dense: int = 0
    density_sum: Tensor | None = None
    beside_sum: Tensor | None = None

    def add(self, record: CallRecord) -> None:
        if record.beside is not None:
            self.beside_sum = _sum(self.beside_sum, record.beside.density_tensor())
        if record.plan is None:
            self.dense += 1
            return
        self.sparse += 1
        self.density_sum = _sum(self.density_sum, record.plan.density_tensor())

    def overall_density(self) -> float:
        """Mean density over all calls of the cell: the share of query-key pairs that was computed; a dense call counts as 1.

        More than 1 where sparse plans ran beside dense calls.
        """
        kept = sum(float(each) for each in (self.density_sum, self.beside_sum) if each is not None)
        return (kept + self.dense) / (self.sparse + self.dense)


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


@dataclass
class ComponentLog:
    """Collects the calls of one component while it runs.

    Attributes:
        name: the component's name in the pipeline.
        backend: the backend that serves it.
        config: its validated configuration.
        model: see ComponentReport.
        cells: calls by (step, layer); None where unknown.
        reasons: dense calls by reason.
        reused, not_reused: see ComponentReport.
        step_sources: forwards by where the step index came from.
        steps: indices of the steps that ran.
        schedule_steps: steps of the schedule; None if unknown.
        token_orders: for each layer and key head, how often which order was chosen.
        token_grids: see ComponentReport.
        implementations: by op.
        stopwatch: time in attention.
        own_blocks: see ComponentReport.
        communication: time in the exchanges between ranks around it.
        split: see ComponentReport.
    """

    name: str
    backend: str
    config: dict[str, Any]
    model: str = ""
    cells: dict[tuple[int | None, int | None], Cell] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    reused: int = 0
    not_reused: Counter[str] = field(default_factory=Counter)
    step_sources: Counter[str] = field(default_factory=Counter)
    steps: set[int] = field(default_factory=set)
    schedule_steps: int | None = None
    token_orders: dict[int | None, list[Counter[str]]] = field(default_factory=dict)
    token_grids: Counter[str] = field(default_factory=Counter)
    implementations: dict[str, set[str]] = field(default_factory=dict)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    communication: Stopwatch = field(default_factory=Stopwatch)
    split: str = ""
    own_blocks: int = 0

    def add(self, step: int | None, layer: int | None, record: CallRecord) -> None:
        """Count one attention call."""
        self.cells.setdefault((step, layer), Cell()).add(record)
        if record.reason is not None:
            self.reasons[record.reason] += 1
        self.reused += record.reused
        if record.not_reused is not None:
            self.not_reused[record.not_reused] += 1
        self.own_blocks += record.own_blocks
        if record.token_orders is not None:
            heads = self.token_orders.setdefault(layer, [Counter() for _ in record.token_orders])
            for head, name in zip(heads, record.token_orders, strict=True):
                head[name] += 1

    def note_step(self, index: int | None, num_steps: int | None, source: str) -> None:
        """A forward began in this step."""
        self.step_sources[source] += 1
        if index is not None:
            self.steps.add(index)
        self.schedule_steps = num_steps

    def note_grids(self, grids: Iterable[tuple[int, int, int]]) -> None:
        """A forward began with these grids of tokens."""
        self.token_grids[" + ".join(map(grid_name, grids))] += 1

    def note_implementation(self, op: str, name: str) -> None:
        """An implementation of an op serves some of the calls."""
        self.implementations.setdefault(op, set()).add(name)

    def report(self) -> ComponentReport:
        """The state of the log, densities fetched from the device."""
        sparse, dense = sum(cell.sparse for cell in self.cells.values()), sum(cell.dense for cell in self.cells.values())
        return ComponentReport(
            backend=self.backend,
            config=self.config,
            model=self.model,
            calls=sparse + dense,
            sparse=sparse,
            dense=dense,
            reused_plans=self.reused,
            not_reused_reasons=dict(self.not_reused.most_common()),
            dense_reasons=dict(self.reasons.most_common()),
            sparse_density=_mean_density(list(self.cells.values())),
            sparse_density_by_step={step: _mean_density(self._of(0, step)) for step in self._keys(0)},
            sparse_density_by_layer={layer: _mean_density(self._of(1, layer)) for layer in self._keys(1)},
            step_sources=dict(self.step_sources.most_common()),
            steps_run=len(self.steps),
            schedule_steps=self.schedule_steps,
            token_orders=dict(sum((head for heads in self.token_orders.values() for head in heads), Counter()).most_common()),
            token_grids=dict(self.token_grids.most_common()),
            implementations={op: ", ".join(sorted(names)) for op, names in self.implementations.items()},
            attention_ms=self.stopwatch.total_ms(),
            split=self.split,
            communication_ms=self.communication.total_ms(),
            own_blocks=self.own_blocks,
        )

    def head_orders(self) -> dict[int, list[str]]:
        """The order that each key head of each layer chose most often, of the layers whose heads choose."""
        known = sorted((layer, heads) for layer, heads in self.token_orders.items() if layer is not None)
        return {layer: [head.most_common(1)[0][0] for head in heads] for layer, heads in known}

    def overall_densities(self) -> list[tuple[int, int, float]]:
        """(step, layer, overall density), of the calls whose step and layer are known."""
        known = [(step, layer, cell) for (step, layer), cell in self.cells.items() if step is not None and layer is not None]
        return sorted((step, layer, cell.overall_density()) for step, layer, cell in known)

    def _keys(self, axis: int) -> list[int]:
        return sorted({key[axis] for key in self.cells if key[axis] is not None})  # type: ignore[misc]

    def _of(self, axis: int, value: int) -> list[Cell]:
        return [cell for key, cell in self.cells.items() if key[axis] == value]


def _mean_density(cells: list[Cell]) -> float | None:
    """Mean kept share of the sparse calls; None if there was none."""
    sums = [cell.density_sum for cell in cells if cell.density_sum is not None]
    return float(torch.stack(sums).sum()) / sum(cell.sparse for cell in cells) if sums else None


@dataclass(frozen=True)
class ComponentReport:
    """What one component's attention did.

    Attributes:
        backend, config: what was asked.
        model: class of the transformer; "Mine, served as Known" where it is a subclass of a known one; "Mine, unlisted: by rule: ..."
            where it is of no family, with what was found about its tokens.
        calls, sparse, dense: numbers of self-attention calls.
        reused_plans: sparse calls whose plan an earlier call had made (`plan_refresh_steps`, `share_plan_between_branches`).
        not_reused_reasons: sparse calls that could have reused a plan by those settings and had to make one, by reason.
        dense_reasons: dense calls by reason.
        sparse_density: mean density over the sparse calls alone: kept share of query-key pairs, protected blocks counted; None if there
            were none.
        sparse_density_by_step, sparse_density_by_layer: the same by step and by layer; dense ones are None.
        step_sources: forwards by where the step index came from.
        steps_run: different steps that ran: fewer than `schedule_steps` where a run begins in the middle (image to image).
        schedule_steps: steps of the schedule of the last forward; None if unknown.
        token_orders: where heads choose an order of the tokens, how many chose which ("frames x rows x columns"), over all layers and runs.
        token_grids: forwards by their grids of tokens (frames x rows x columns), the generated one first: "1x64x64 + 1x64x64" with one
            reference. Forwards of an unknown layout are not counted.
        implementations: which implementation of each op served; several, separated by commas, where calls differ in what they need.
        attention_ms: time in attention, order and selection included.
        split: where several ranks share the tokens, which one this is: everything else here is about its part alone. Empty otherwise.
        communication_ms: time in the exchanges between ranks around attention, waiting for slower ranks included.
        own_blocks: sparse calls in which this rank's queries make other blocks than in one process, so that its plans are its own.
    """

    backend: str
    config: dict[str, Any]
    model: str
    calls: int
    sparse: int
    dense: int
    reused_plans: int
    not_reused_reasons: dict[str, int]
    dense_reasons: dict[str, int]
    sparse_density: float | None
    sparse_density_by_step: dict[int, float | None]
    sparse_density_by_layer: dict[int, float | None]
    step_sources: dict[str, int]
    steps_run: int
    schedule_steps: int | None
    token_orders: dict[str, int]
    token_grids: dict[str, int]
    implementations: dict[str, str]
    attention_ms: float
    split: str = ""
    communication_ms: float = 0.0
    own_blocks: int = 0

    def sentence(self) -> str:
        """One line for people."""
        parts = []
        if self.sparse:
            asked = f"asked sparsity {self.config.get('sparsity')}"
            parts.append(f"{self.sparse} sparse at density {self.sparse_density:.3f} ({asked}{self._reuse()}{self._orders()})")
        if self.dense:
            parts.append(f"{self.dense} dense ({_counted(self.dense_reasons)})")
        ran = " / ".join(parts) or self._no_calls()
        notes = self._part_of_schedule() + self._several_grids() + self._served_as()
        return f"{self.backend}: {ran}{notes}; {self.attention_ms / 1e3:.2f} s in attention{self._ranks()}"

    def _ranks(self) -> str:
        if not self.split:
            return ""
        blocks = f"; {self.own_blocks} calls by query blocks of this rank's own" if self.own_blocks else ""
        whose = self.split if self.split.startswith(ALL_RANKS) else f"{self.split} alone"
        return f", {self.communication_ms / 1e3:.2f} s in exchanges; {whose}{blocks}"

    @classmethod
    def of_ranks(cls, reports: Sequence[ComponentReport]) -> ComponentReport:
        """See `AttentionReport.of_ranks`."""
        return replace(
            reports[0],
            calls=sum(report.calls for report in reports),
            sparse=sum(report.sparse for report in reports),
            dense=sum(report.dense for report in reports),
            reused_plans=sum(report.reused_plans for report in reports),
            own_blocks=sum(report.own_blocks for report in reports),
            not_reused_reasons=_summed(report.not_reused_reasons for report in reports),
            dense_reasons=_summed(report.dense_reasons for report in reports),
            token_orders=_summed(report.token_orders for report in reports),
            sparse_density=_mean((report.sparse_density, report.sparse) for report in reports),
            sparse_density_by_step=_means([report.sparse_density_by_step for report in reports]),
            sparse_density_by_layer=_means([report.sparse_density_by_layer for report in reports]),
            attention_ms=max(report.attention_ms for report in reports),
            communication_ms=max(report.communication_ms for report in reports),
            split=f"{ALL_RANKS}{len(reports)} ranks together, times of the slowest",
        )

    def _served_as(self) -> str:
        return f"; {self.model}" if "served as" in self.model or "unlisted" in self.model else ""

    def _part_of_schedule(self) -> str:
        if self.schedule_steps is None or not 0 < self.steps_run < self.schedule_steps:
            return ""
        return f"; {self.steps_run} of the schedule's {self.schedule_steps} steps ran"

    def _several_grids(self) -> str:
        several = {grids: count for grids, count in self.token_grids.items() if "+" in grids}
        return f"; forwards by token grids: {_counted(several)}" if several else ""

    def _orders(self) -> str:
        return f"; token orders of the heads: {_counted(self.token_orders)}" if self.token_orders else ""

    def _reuse(self) -> str:
        reused = f"; {self.reused_plans} with a reused plan" if self.reused_plans else ""
        refused = f"; no reuse of plans: {_counted(self.not_reused_reasons)}" if self.not_reused_reasons else ""
        return reused + refused

    def _no_calls(self) -> str:
        forwards = sum(self.step_sources.values())
        if not forwards:
            return "no calls"
        return f"no calls in {forwards} forwards; its attention processors or their backend were replaced after the installation"


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    return dict(sum(map(Counter, counts), Counter[str]()).most_common())


def _mean(values: Iterable[tuple[float | None, int]]) -> float | None:
    """Of values with weights; None of none."""
    known = [(value, weight) for value, weight in values if value is not None and weight]
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known) if known else None


def _means(ranks: Sequence[dict[int, float | None]]) -> dict[int, float | None]:
    return {key: _mean((densities.get(key), 1) for densities in ranks) for key in sorted({key for densities in ranks for key in densities})}


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.items())


@dataclass(frozen=True)
class AttentionReport:
    """Reports of all components.

    Attributes:
        components: by name in the pipeline.
        not_served: components and single layers ("transformer: blocks.0.attn1") left as they were, with the reason.
    """

    components: dict[str, ComponentReport]
    not_served: dict[str, str]

    @classmethod
    def of_ranks(cls, reports: Sequence[AttentionReport]) -> AttentionReport:
        """One report of what several ranks did: calls and reasons summed, densities averaged, times of the slowest.

        Examples:
            On every rank, after a run:

            >>> import torch.distributed as dist
            >>> from ditattn.runtime.report import AttentionReport
            >>> reports = [None] * dist.get_world_size()
            >>> dist.all_gather_object(reports, handle.report())
            >>> print(AttentionReport.of_ranks(reports).summary())
        """
        first = reports[0]
        merged = {name: ComponentReport.of_ranks([report.components[name] for report in reports]) for name in first.components}
        return cls(merged, dict(first.not_served))

    @property
    def attention_ms(self) -> float:
        """Time in attention of all components, milliseconds."""
        return sum(component.attention_ms for component in self.components.values())

    @property
    def communication_ms(self) -> float:
        """Time in exchanges between ranks of all components, milliseconds."""
        return sum(component.communication_ms for component in self.components.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "components": {name: dict(vars(component)) for name, component in self.components.items()},
            "not_served": dict(self.not_served),
            "attention_ms": self.attention_ms,
        }

    def summary(self) -> str:
        """What ran sparse, at what density, how long attention took and why calls were dense: a line per component.

        What was not served has a line per reason.
        """
        lines = [f"attention ({name}): {component.sentence()}" for name, component in self.components.items()]
        reasons = dict.fromkeys(self.not_served.values())
        names = {reason: ", ".join(name for name, why in self.not_served.items() if why == reason) for reason in reasons}
        lines += [f"attention ({name}): not served: {reason}" for reason, name in names.items()]
        return "\n".join(lines) or "attention: no component was served"
