"""What `ditattn tune` does: dense runs, probe, search, check, and the file that says what was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import typer

from ditattn.backends.registry import load_backend
from ditattn.backends.setting import Setting
from ditattn.cli.measuring import Bench, check_settings, job_of, set_up
from ditattn.cli.messages import set_up_messages
from ditattn.cli.outputs import Outbox, check_plain_name
from ditattn.cli.settings import TuneSettings
from ditattn.compare.setting import Clip
from ditattn.errors import ConfigError
from ditattn.ops import cpu_library
from ditattn.tune.candidate import TUNED_KEYS, Candidate, Outcome, Target
from ditattn.tune.objective import Objective, check, probe
from ditattn.tune.result import Checked, Finding, count_clips, yaml_text
from ditattn.tune.search import Search, disagreements
from ditattn.tune.sensitivity import PROBED_SPARSITIES, Sensitivity
from ditattn.tune.state import TuneState

__all__ = ["EXIT_NOTHING_FOUND", "run_tune"]

EXIT_NOTHING_FOUND = 3

# added to the seeds for clips that nothing was tuned on
OTHER_SEEDS = 1_000_003


@dataclass(frozen=True)
class Plan:
    """The request, checked."""

    settings: TuneSettings
    setting: Setting
    target: Target
    clips: list[Clip]
    held_out: list[Clip]


def run_tune(settings: TuneSettings, *, debug: bool = False) -> None:
    """Run the verb.

    Raises:
        DitattnError, OSError: see the modules that check.
        typer.Exit: with EXIT_NOTHING_FOUND.
    """
    set_up_messages(debug)
    plan = _plan(settings)
    job = job_of(settings)
    check_settings(job, [plan.setting.with_keys(**Candidate(0.5).keys)])
    bench = set_up(job, strict=settings.strict, cached=True)
    state = TuneState.open(Path(settings.output_path), _facts(bench, plan))
    objective = Objective(bench.references, plan.setting, list(plan.clips), plan.target)
    path = _yaml_path(settings, state)
    sensitivity = _measure_sensitivity(bench, plan, state, objective)
    search = _search(plan, state, objective, sensitivity, path)
    best = search.best
    if best is None:
        _say(f"nothing meets the target ({plan.target.words()}) faster than dense, in {len(state.outcomes)} runs: {_nearest(state)}")
        raise typer.Exit(EXIT_NOTHING_FOUND)
    # there even if the check is interrupted
    _write(path, _finding(plan, state, sensitivity, best, None))
    _say(f"check on {count_clips(len(plan.held_out))} that nothing was tuned on")
    psnr, ssim, found = check(bench.references, plan.setting.with_keys(**best.keys), plan.held_out, needs_ssim=plan.target.ssim is not None)
    speed_ups = found.speed_ups(0)
    checked = Checked(len(plan.held_out), psnr, ssim, median(speed_ups), min(speed_ups), plan.target.met_by(psnr, ssim))
    finding = _finding(plan, state, sensitivity, best, checked)
    _write(path, finding)
    for line in finding.summary():
        typer.echo(line)
    typer.echo(f"wrote {path}; use it: --attention-backend {plan.setting.backend} --attention-backend-config {path}")
    if not checked.is_faster:
        raise typer.Exit(EXIT_NOTHING_FOUND)


def _plan(settings: TuneSettings) -> Plan:
    if settings.target_psnr is None:
        raise ConfigError("a target is needed: --target-psnr 30 (decibels against dense, on the worst clip)")
    if settings.output_file_name is not None:
        check_plain_name(settings.output_file_name)
    backend = load_backend(settings.attention_backend)
    if not backend.is_sparse:
        raise ConfigError(f"{backend.name} is dense: there is nothing to tune; name a sparse backend")
    if taken := sorted(set(settings.attention_backend_config) & set(TUNED_KEYS)):
        raise ConfigError(f"{', '.join(taken)} cannot be held fixed: that is what tune finds")
    setting = Setting.parse(backend.name, settings.attention_backend_config, settings.component_attention_backends)
    clips = [Clip(prompt, seed) for prompt in settings.prompt for seed in settings.seed]
    others = settings.check_prompt or settings.prompt
    held_out = [Clip(prompt, (seed + OTHER_SEEDS) % 2**63) for prompt in others for seed in settings.seed]
    return Plan(settings, setting, Target(settings.target_psnr, settings.target_ssim), clips, held_out)


def _facts(bench: Bench, plan: Plan) -> dict[str, Any]:
    """Everything that an outcome depends on. The budget is not among it: a larger one goes on with the same search."""
    setting = plan.setting
    return {
        **bench.facts,
        "clips": [[clip.prompt, clip.seed] for clip in plan.clips],
        "target": [plan.target.psnr, plan.target.ssim],
        "backend": setting.backend,
        "config": setting.keys,
        "components": dict(setting.components),
        "strict": plan.settings.strict,
        # DITATTN_CPU_ISA and a new installation change them, and with them every time
        "kernels": cpu_library.selection().sentence() if bench.workload.device.type == "cpu" else None,
    }


def _measure_sensitivity(bench: Bench, plan: Plan, state: TuneState, objective: Objective) -> Sensitivity:
    """The dense runs, and the probe unless an earlier run of the same search has made it."""
    _say(f"dense: {count_clips(len(plan.clips))}" + (f", going on after {len(state.outcomes)} runs" if state.outcomes else ""))
    attention_share = objective.prepare(anew=not state.readings)
    if not state.readings:
        _say(f"probe: {len(PROBED_SPARSITIES)} sparsities on every attention call of a dense run")
        state.keep_probe(probe(bench.references, plan.setting, plan.clips[0]), attention_share)
    return Sensitivity.from_readings(state.readings, state.attention_share)


def _search(plan: Plan, state: TuneState, objective: Objective, sensitivity: Sensitivity, path: Path) -> Search:
    """Run the search; whatever ends it early, the best so far is written down."""
    with _bar(plan.settings.budget_runs) as advance:

        def evaluate(candidate: Candidate) -> Outcome:
            outcome = objective(candidate)
            state.keep_outcome(candidate, outcome)
            advance(f"run {len(state.outcomes)} of at most {plan.settings.budget_runs}: {candidate.words()}: {outcome.words()}")
            return outcome

        keeps_first_frame = "first_frame_sink" not in plan.setting.keys
        search = Search(sensitivity, plan.target, evaluate, plan.settings.budget_runs, keeps_first_frame, state.outcomes)
        try:
            search.run()
        except BaseException:
            _keep_best(plan, state, sensitivity, search.best, path)
            raise
    return search


def _keep_best(plan: Plan, state: TuneState, sensitivity: Sensitivity, best: Candidate | None, path: Path) -> None:
    if best is None:
        _say(f"nothing met the target yet; the same command goes on from {state.path}")
        return
    _write(path, _finding(plan, state, sensitivity, best, None))
    _say(f"kept the best of {len(state.outcomes)} runs in {path}; the same command goes on from {state.path}")


def _finding(plan: Plan, state: TuneState, sensitivity: Sensitivity, best: Candidate, checked: Checked | None) -> Finding:
    contradictions, pairs = disagreements(sensitivity, state.outcomes)
    return Finding(
        setting=plan.setting.with_keys(**best.keys),
        best=best,
        target=plan.target,
        outcomes=state.outcomes,
        facts=state.facts,
        checked=checked,
        contradictions=contradictions,
        pairs=pairs,
    )


def _nearest(state: TuneState) -> str:
    if not state.outcomes:
        return "nothing was tried"
    candidate, outcome = max(state.outcomes.items(), key=lambda item: (item[1].meets, item[1].psnr))
    return f"the nearest was {candidate.words()}: {outcome.words()}"


def _yaml_path(settings: TuneSettings, state: TuneState) -> Path:
    name = settings.output_file_name
    if name is None:
        return state.path.with_name(state.path.name.replace(".state.json", ".yaml"))
    return Path(settings.output_path) / (name.removesuffix(".yaml").removesuffix(".yml") + ".yaml")


def _write(path: Path, finding: Finding) -> None:
    with Outbox() as outbox:
        outbox.draft(path).write_text(yaml_text(finding), encoding="utf-8")
        outbox.commit()


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    """A progress bar on a terminal; a line per run everywhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("runs", total=total)

        def advance(line: str) -> None:
            progress.advance(task)
            console.print(line, soft_wrap=True, markup=False, highlight=False)

        yield advance


def _say(line: str) -> None:
    typer.echo(line, err=True)
