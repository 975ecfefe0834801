"""What `ditattn tune` does: dense runs, the step cache alone, probe, search, check, and the file that says what was found."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from ditattn.backends.registry import load_backend
from ditattn.backends.setting import Setting, StepCache, split_step_cache
from ditattn.cli.job import load, prepare
from ditattn.cli.output import DraftFiles, check_plain_name
from ditattn.cli.progress import progress_bar
from ditattn.cli.ranks import this_rank, together
from ditattn.cli.references import check_metrics, dense_references
from ditattn.cli.settings import TuneSettings
from ditattn.cli.step_cache import one_step_cache
from ditattn.cli.terminal import say, set_up_messages
from ditattn.compare.measure import References
from ditattn.compare.setting import REFERENCE, Clip
from ditattn.errors import ConfigError
from ditattn.ops import cpu_library
from ditattn.progress import Progress
from ditattn.tune.candidate import TUNED_KEYS, Candidate, Outcome, Target
from ditattn.tune.head_orders import most_chosen_orders, setting_chooses_orders
from ditattn.tune.objective import Objective, check, probe
from ditattn.tune.result import Checked, Finding, alone_words, count_clips, yaml_text
from ditattn.tune.search import Search, disagreements
from ditattn.tune.sensitivity import PROBED_SPARSITIES, Sensitivity
from ditattn.tune.state import TuneState

__all__ = ["EXIT_NOTHING_FOUND", "run"]

EXIT_NOTHING_FOUND = 3

# added to the seeds for clips that nothing was tuned on
OTHER_SEEDS = 1_000_003


@dataclass(frozen=True)
class TuneRequest:
    """What is asked, checked."""

    settings: TuneSettings
    setting: Setting
    target: Target
    clips: list[Clip]
    held_out: list[Clip]


def run(settings: TuneSettings, *, debug: bool = False) -> None:
    """Run the verb.

    Raises:
        DitattnError, OSError: see the modules that check.
        typer.Exit: with EXIT_NOTHING_FOUND.
    """
    set_up_messages(debug)
    request = _request(settings)
    check_metrics()
    job = prepare(settings, [REFERENCE, request.setting])
    request = replace(request, setting=replace(request.setting, step_cache=one_step_cache(settings, job)))
    with together(settings.num_processes, job.device):
        pipe, _ = load(job)
        with progress_bar() as progress:
            references = dense_references(job, pipe, cached=True, progress=progress)
            state = TuneState.open(Path(settings.output_path), _facts(references, request), references.workload.ranks)
            path = _yaml_path(settings, state)
            finding = _find(references, request, state, path, progress)
        is_faster = _tell(request, state, path, finding)
    if not is_faster:
        raise typer.Exit(EXIT_NOTHING_FOUND)


def _tell(request: TuneRequest, state: TuneState, path: Path, finding: Finding | None) -> bool:
    """What was found, for people; True if something is faster than dense."""
    if finding is None:
        say(_nothing_found(request, state))
        return False
    for line in finding.summary():
        typer.echo(line)
    typer.echo(f"wrote {path}; use it: --attention-backend {request.setting.backend} --attention-backend-config {path}")
    return finding.checked is not None and finding.checked.is_faster


def _nothing_found(request: TuneRequest, state: TuneState) -> str:
    cache, alone, target = request.setting.step_cache, state.cache_alone, request.target.words()
    if cache is None or alone is None:
        return f"nothing meets the target ({target}) faster than dense, in {len(state.outcomes)} runs: {_nearest(state)}"
    if not alone.meets:
        return (
            f"nothing was searched: {alone_words(cache)}, misses the target ({target}): {alone.words()}. Sparse attention adds to that: "
            "take keys with which the cache leaves out less, a lower target, or no cache"
        )
    return (
        f"nothing meets the target ({target}) faster than dense and than the step cache, in {len(state.outcomes)} runs: {_nearest(state)}; "
        f"{alone_words(cache)}: {alone.words()}"
    )


def _find(references: References, request: TuneRequest, state: TuneState, path: Path, progress: Progress) -> Finding | None:
    """Search, choose the orders of heads, check, and write what is known after each; None if nothing meets the target.

    Several ranks go the same way, since the first one decides.
    """
    objective = Objective(references, request.setting, list(request.clips), request.target)
    attention_share = _run_dense(state, objective, progress)
    if request.setting.step_cache is not None:
        _run_cache_alone(request.setting.step_cache, state, objective, progress)
        if state.cache_alone is not None and not state.cache_alone.meets:
            return None
        attention_share = state.attention_share
    sensitivity = _measure_sensitivity(references, request, state, objective, attention_share, progress)
    best = _search(request, state, objective, sensitivity, path, progress).best
    if best is None:
        return None
    # there even if what follows is interrupted
    _write(path, _finding(request, state, sensitivity, best, None))
    if setting_chooses_orders(request.setting):
        progress.begin(f"orders: {count_clips(len(request.clips))} with the setting found, to see what heads choose", counts=False)
        orders = most_chosen_orders(references.workload, request.setting.with_keys(**best.keys), request.clips)
        if not orders:
            progress.note("several denoisers share the setting, so their heads go on choosing")
        request = replace(request, setting=request.setting.with_keys(head_bricks=orders))
        _write(path, _finding(request, state, sensitivity, best, None))
    progress.begin(f"check on {count_clips(len(request.held_out))} that nothing was tuned on", counts=False)
    checked = check(references, request.setting.with_keys(**best.keys), request.held_out, request.target)
    finding = _finding(request, state, sensitivity, best, checked)
    _write(path, finding)
    return finding


def _request(settings: TuneSettings) -> TuneRequest:
    if settings.target_psnr is None:
        raise ConfigError("a target is needed: --target-psnr 30 (decibels against dense, on the worst clip)")
    if settings.output_file_name is not None:
        check_plain_name(settings.output_file_name)
    backend = load_backend(settings.attention_backend)
    if not backend.is_sparse:
        raise ConfigError(f"{backend.name} is dense: there is nothing to tune; name a sparse backend")
    if taken := sorted(set(settings.attention_backend_config) & {*TUNED_KEYS, "preset"}):
        raise ConfigError(f"{', '.join(taken)} cannot be held fixed: that is what tune finds")
    keys, _ = split_step_cache(settings.attention_backend_config)
    setting = Setting.parse(backend.name, keys, settings.component_attention_backends)
    # fails before a model is loaded where the backend lacks what is tuned
    setting.with_keys(**Candidate(0.5).keys)
    clips = [Clip(prompt, seed) for prompt in settings.prompt for seed in settings.seed]
    others = settings.check_prompt or settings.prompt
    held_out = [Clip(prompt, (seed + OTHER_SEEDS) % 2**63) for prompt in others for seed in settings.seed]
    return TuneRequest(settings, setting, Target(settings.target_psnr, settings.target_ssim), clips, held_out)


def _facts(references: References, request: TuneRequest) -> dict[str, Any]:
    """Everything that an outcome depends on. The budget is not among it: a larger one goes on with the same search."""
    setting = request.setting
    return {
        **references.facts,
        "clips": [[clip.prompt, clip.seed] for clip in request.clips],
        "target": [request.target.psnr, request.target.ssim],
        "backend": setting.backend,
        "config": setting.keys,
        "components": dict(setting.components),
        **({} if setting.step_cache is None else {"step_cache": setting.step_cache.as_dict()}),
        "strict": request.settings.strict,
        # DITATTN_CPU_ISA and a new installation change them, and with them every time
        "kernels": cpu_library.selection().sentence() if references.workload.device.type == "cpu" else None,
    }


def _run_dense(state: TuneState, objective: Objective, progress: Progress) -> float:
    """The dense runs; returns the share of their time that is self-attention."""
    going_on = f", going on after {len(state.outcomes)} runs" if state.outcomes else ""
    progress.begin(f"dense: {count_clips(len(objective.clips))}{going_on}", counts=False)
    return objective.prepare(anew=not state.readings and state.cache_alone is None)


def _run_cache_alone(cache: StepCache, state: TuneState, objective: Objective, progress: Progress) -> None:
    """Unless an earlier run of the same search has done it; says whether it leaves room for sparse attention."""
    if state.cache_alone is None:
        progress.begin(f"{alone_words(cache)}: {count_clips(len(objective.clips))}", counts=False)
        state.keep_cache_alone(*objective.step_cache_alone())
    assert state.cache_alone is not None
    progress.note(f"{alone_words(cache)}: {state.cache_alone.words()}")


def _measure_sensitivity(
    references: References, request: TuneRequest, state: TuneState, objective: Objective, attention_share: float, progress: Progress
) -> Sensitivity:
    """The probe, unless an earlier run of the same search has made it, and what it says."""
    if not state.readings:
        progress.begin(f"probe: {len(PROBED_SPARSITIES)} sparsities on every attention call of a dense run", counts=False)
        state.keep_probe(probe(references, request.setting, request.clips[0]), attention_share)
    if state.cache_alone is None:
        return Sensitivity.from_readings(state.readings, state.attention_share)
    return Sensitivity.from_readings(state.readings, state.attention_share, state.cache_alone.time_share, objective.num_steps)


def _search(
    request: TuneRequest, state: TuneState, objective: Objective, sensitivity: Sensitivity, path: Path, progress: Progress
) -> Search:
    """Run the search; whatever ends it early, the best so far is written down."""
    budget = request.settings.budget_runs
    progress.expect(max(budget - len(state.outcomes), 0))
    progress.begin(f"search: at most {budget} settings")

    def evaluate(candidate: Candidate) -> Outcome:
        outcome = objective(candidate)
        state.keep_outcome(candidate, outcome)
        progress.note(f"run {len(state.outcomes)} of at most {budget}: {candidate.words()}: {outcome.words()}")
        progress.advance()
        return outcome

    keeps_first_frame = "first_frame_sink" not in request.setting.keys
    psnr_of_cache = math.inf if state.cache_alone is None else state.cache_alone.psnr
    search = Search(sensitivity, request.target, evaluate, budget, keeps_first_frame, psnr_of_cache, state.outcomes)
    try:
        search.run()
    except BaseException:
        _keep_best(request, state, sensitivity, search.best, path)
        raise
    return search


def _keep_best(request: TuneRequest, state: TuneState, sensitivity: Sensitivity, best: Candidate | None, path: Path) -> None:
    if best is None:
        say(f"nothing met the target yet; the same command goes on from {state.path}")
        return
    _write(path, _finding(request, state, sensitivity, best, None))
    say(f"kept the best of {len(state.outcomes)} runs in {path}; the same command goes on from {state.path}")


def _finding(request: TuneRequest, state: TuneState, sensitivity: Sensitivity, best: Candidate, checked: Checked | None) -> Finding:
    contradictions, pairs = disagreements(sensitivity, state.outcomes)
    return Finding(
        setting=request.setting.with_keys(**best.keys),
        best=best,
        target=request.target,
        outcomes=state.outcomes,
        facts=state.facts,
        checked=checked,
        cache_alone=state.cache_alone,
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
    if not this_rank().is_first:
        return
    with DraftFiles() as files:
        files.draft(path).write_text(yaml_text(finding), encoding="utf-8")
        files.commit()
