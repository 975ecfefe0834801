"""`ditattn tune` as a user types it: the file it writes, the check, interruption and resumption, errors."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("torchmetrics", reason="SSIM comes from torchmetrics")

import sparse_clock
from ditattn.backends.config import RainFusionAttentionConfig
from ditattn.backends.permuted_sparse_attn import PermutedSparseAttentionConfig
from ditattn.cli.app import run
from ditattn.compare.metrics import pooled_psnr
from ditattn.ops import cpu_library
from ditattn.plan.bricks import parse_bricks
from ditattn.tune import objective
from ditattn.tune.sensitivity import Sensitivity
from ditattn.values import parse_config

# 4 frames of 64 x 64 pixels: 1024 tokens, 8 blocks
CALL = ("--height", 64, "--width", 64, "--num-frames", 4, "--num-inference-steps", 4, "--guidance-scale", 1)
FIXED = ("--attention-backend-config", "min_tokens=0")


def quick_tune(wan_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Its arguments."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(Sensitivity, "from_readings", classmethod(sparse_clock.as_if_faster))
    backend = ("--attention-backend", "rain_fusion_attn")
    return ["tune", "--model-path", wan_folder, "--prompt", "a red circle", *CALL, *FIXED, *backend, "--output-path", folder / "out"]


@pytest.fixture
def options(wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return quick_tune(wan_folder, tmp_path, monkeypatch)


def files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


def test_the_file_is_a_configuration_and_the_state_holds_every_run(ditattn, options, tmp_path):
    done = ditattn(*options, "--prompt", "a blue square", "--target-psnr", 40, "--target-ssim", 0.9, "--budget-runs", 5)
    # 3: it may be slower than dense on the clock
    assert done.status in (0, 3), done.err
    path, state = files(tmp_path / "out", "*.yaml")[0], json.loads(files(tmp_path / "out", "*.state.json")[0].read_text())
    config = RainFusionAttentionConfig.from_mapping(parse_config(str(path)))
    assert config.min_tokens == 0
    tried = [one["candidate"] for one in state["outcomes"]]
    assert len(tried) <= 5
    assert config.sparsity in [one["sparsity"] for one in tried]
    met = [one for one in state["outcomes"] if one["outcome"]["meets"]]
    assert all(float(one["outcome"]["psnr"]) >= 40 and one["outcome"]["ssim"] >= 0.9 for one in met)
    text = path.read_text()
    assert text.count("# sparsity=") == len(tried)
    for words in (
        "target: PSNR at least 40 dB and SSIM at least 0.9",
        "on 2 clips it was not tuned on: worst PSNR",
        "a blue square (seed 42)",
    ):
        assert words in text
        assert words in done.out or "seed" in words
    assert sorted(state["readings"]) == ["0.3", "0.6", "0.8", "0.95"]
    assert set(yaml.safe_load(text)) == {"min_tokens", "sparsity", "skip_first_steps", "skip_last_steps", "skip_layers"} | (
        {"first_frame_sink"} & set(yaml.safe_load(text))
    )
    # what it wrote runs
    used = ditattn("generate", *options[1:5], *CALL, "--output-path", tmp_path / "video", "--attention-backend", "rain_fusion_attn",
                   "--attention-backend-config", path)  # fmt: skip
    assert used.status == 0, used.err
    assert f"asked sparsity {config.sparsity}" in used.out


def test_what_heads_choose_is_written_down_for_later_runs(ditattn, options, tmp_path):
    """For the recommended backend, which is the default."""
    at = options.index("--attention-backend")
    done = ditattn(*options[:at], *options[at + 2 :], "--target-psnr", 20, "--budget-runs", 1, "--output-file-name", "tuned")
    assert done.status in (0, 3), done.err
    path = tmp_path / "out" / "tuned.yaml"
    config = PermutedSparseAttentionConfig.from_mapping(parse_config(str(path)))
    # one layer of two heads
    assert [len(names.split(",")) for names in config.head_bricks] == [2]
    assert all(parse_bricks(names) for names in config.head_bricks)
    used = ditattn("generate", *options[1:5], *CALL, "--output-path", tmp_path / "video", "--output-file-name", "used.mp4",
                   "--attention-backend", "permuted_sparse_attn", "--attention-backend-config", path)  # fmt: skip
    assert used.status == 0, used.err
    record = json.loads((tmp_path / "video" / "used.json").read_text())
    counts = Counter(name for names in config.head_bricks for name in names.split(","))
    assert record["attention"]["components"]["transformer"]["token_orders"] == counts


def test_an_interrupted_tune_keeps_what_it_found_and_goes_on(ditattn, options, tmp_path, monkeypatch):
    command = [*options, "--target-psnr", 40, "--budget-runs", 4, "--output-file-name", "tuned"]
    run_clip, made = objective.run_clip, []

    def interrupted(work, setting, clip, **changes):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(setting.keys)
        return run_clip(work, setting, clip, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(objective, "run_clip", interrupted)
        stopped = ditattn(*command)
    assert stopped.status == 130
    assert "goes on from" in stopped.err
    state = files(tmp_path / "out", "*.state.json")[0]
    before = json.loads(state.read_text())["outcomes"]
    assert len(before) == 2
    kept = (tmp_path / "out" / "tuned.yaml").is_file()
    assert kept is any(one["outcome"]["meets"] for one in before)
    if kept:
        assert "not checked on other clips" in (tmp_path / "out" / "tuned.yaml").read_text()

    made.clear()
    monkeypatch.setattr(objective, "probe", lambda *_: pytest.fail("the probe was run again"))
    monkeypatch.setattr(objective.References, "make", lambda *_: pytest.fail("the dense clip was made again"))
    monkeypatch.setattr("ditattn.cli.tune.check", lambda *_, **__: pytest.skip("the check makes dense clips of its own"))
    monkeypatch.setattr(objective, "run_clip", lambda *a, **k: made.append(a[1].keys) or run_clip(*a, **k))
    with pytest.raises(pytest.skip.Exception):
        ditattn(*command)
    after = json.loads(state.read_text())["outcomes"]
    assert after[:2] == before
    assert len(after) == 2 + len(made) <= 4


def test_a_check_that_is_interrupted_leaves_the_file(ditattn, options, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ditattn.cli.tune.check", stop)
    done = ditattn(*options, "--target-psnr", 20, "--budget-runs", 1, "--output-file-name", "tuned.yaml")
    assert done.status == 130
    text = (tmp_path / "out" / "tuned.yaml").read_text()
    assert "# not checked on other clips" in text
    assert "on the 1 clip it was tuned on" in text
    assert RainFusionAttentionConfig.from_mapping(yaml.safe_load(text)).sparsity > 0


def test_an_impossible_target_is_said_to_be_impossible(ditattn, options, tmp_path, monkeypatch):
    # a kernel may give the very same pixels where a setting drops nothing of these 8 blocks: no clip is better than 60 dB here
    monkeypatch.setattr(objective, "pooled_psnr", lambda *frames: min(60.0, pooled_psnr(*frames)))
    done = ditattn(*options, "--target-psnr", 400, "--budget-runs", 3)
    assert done.status == 3
    assert "nothing meets the target (PSNR at least 400 dB) faster than dense, in" in done.err
    assert "the nearest was" in done.err
    assert not files(tmp_path / "out", "*.yaml")


def test_a_changed_question_has_another_state(ditattn, options, tmp_path):
    for target in (390, 400):
        ditattn(*options, "--target-psnr", target, "--budget-runs", 1)
    assert len(files(tmp_path / "out", "*.state.json")) == 2
    # a larger budget is the same question
    ditattn(*options, "--target-psnr", 400, "--budget-runs", 2)
    states = files(tmp_path / "out", "*.state.json")
    assert sorted(len(json.loads(state.read_text())["outcomes"]) for state in states) == [1, 2]
    states[0].write_text("{")
    states[1].write_text("{")
    damaged = ditattn(*options, "--target-psnr", 400, "--budget-runs", 2)
    assert (damaged.status, len(damaged.error_lines)) == (2, 1)
    assert "is damaged" in damaged.err


def test_other_kernels_are_another_question(ditattn, options, tmp_path, monkeypatch):
    command = [*options, "--target-psnr", 400, "--budget-runs", 1]
    ditattn(*command)
    monkeypatch.setattr(cpu_library.Selection, "sentence", lambda _: "another variant")
    ditattn(*command)
    assert len(files(tmp_path / "out", "*.state.json")) == 2


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("a driver gave up")], ids=["memory", "driver"])
def test_a_search_that_fails_keeps_the_best_so_far(ditattn, options, tmp_path, monkeypatch, error):
    run_clip, made = objective.run_clip, []

    def fails(work, setting, clip, **changes):
        if made:
            raise error
        made.append(setting.keys)
        return run_clip(work, setting, clip, **changes)

    monkeypatch.setattr(objective, "run_clip", fails)
    done = ditattn(*options, "--target-psnr", 1, "--budget-runs", 3, "--output-file-name", "tuned")
    assert (done.status, len(done.error_lines)) == (1, 1), done.err
    assert "kept the best of 1 runs" in done.err
    assert "# not checked on other clips" in (tmp_path / "out" / "tuned.yaml").read_text()


CACHE_KEYS = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": [0, 1001]}
CACHE = ("--cache", "pyramid_attention_broadcast", "--cache-config", json.dumps(CACHE_KEYS))
STEP_CACHE = {"name": "pyramid_attention_broadcast", "keys": CACHE_KEYS}


@dataclass(frozen=True)
class Tuned:
    """A tune with a step cache that leaves out every second call.

    Attributes:
        settings: those that were run on a clip, of which those of the dense runs are not among them.
    """

    status: int
    out: str
    err: str
    folder: Path
    settings: list[Any]

    @property
    def path(self) -> Path:
        return self.folder / "out" / "tuned.yaml"


@pytest.fixture(scope="module")
def tuned(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder, made, run_clip = tmp_path_factory.mktemp("tuned"), [], objective.run_clip
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        patch.setattr(objective, "run_clip", lambda *a, **k: made.append(a[1]) or run_clip(*a, **k))
        arguments = [*quick_tune(wan_folder, folder, patch), *CACHE, "--target-psnr", 5, "--budget-runs", 2, "--output-file-name", "tuned"]
        status = run([str(word) for word in arguments])
    return Tuned(status, out.getvalue(), err.getvalue(), folder, made)


def test_a_step_cache_is_on_in_every_run_but_the_dense_ones(tuned):
    # 3: it may be slower than dense on the clock
    assert tuned.status in (0, 3), tuned.err
    alone, *candidates = tuned.settings
    assert (alone.backend, alone.step_cache.as_dict()) == ("torch_sdpa", STEP_CACHE)
    assert candidates
    assert {one.backend for one in candidates} == {"rain_fusion_attn"}
    assert all(one.step_cache == alone.step_cache for one in candidates)
    state = json.loads(files(tuned.folder / "out", "*.state.json")[0].read_text())
    assert state["cache_alone"]["meets"]
    assert {(one["step"], one["layer"]) for some in state["readings"].values() for one in some} == {(0, 0), (2, 0)}
    # the dense runs have all steps
    runs = [json.loads(place.read_text())["run"] for place in (tuned.folder / "cache").rglob("run.json")]
    assert [[step for step, _, _ in run["densities"]["transformer"]] for run in runs] == [[0, 1, 2, 3]]
    words = "pyramid_attention_broadcast spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=[0, 1001]"
    text = tuned.path.read_text()
    for line in (f"{words} alone, with dense attention: PSNR", f", beside the step cache {words}", "# there pyramid_attention_broadcast"):
        assert line in text
        assert line.removeprefix("# ") in tuned.out
    assert tuned.err.index("alone, with dense attention: PSNR") < tuned.err.index("search: at most")
    assert yaml.safe_load(text)["step_cache"] == STEP_CACHE


OVERRIDES = (
    ((), "the configuration was tuned beside it; --cache none leaves it off", 2),
    (CACHE, None, 2),
    (("--cache", "none"), "; --cache asks for none", 4),
    (("--cache", "mag", "--cache-config", "calibrate=true"), "; --cache asks for mag calibrate=True", 4),
)


def test_generate_reads_the_step_cache_of_the_file(ditattn, options, tuned, tmp_path):
    path = tuned.path
    generate = ("generate", *options[1:5], *CALL, "--output-path", tmp_path, "--output-file-name", "used.mp4",
                "--attention-backend", "rain_fusion_attn", "--attention-backend-config", path)  # fmt: skip
    for asked, said, calls in OVERRIDES:
        used = ditattn(*generate, *asked)
        assert used.status == 0, used.err
        assert ("was tuned beside" in used.err) is (said is not None)
        assert (said or "") in used.err
        record = json.loads((tmp_path / "used.json").read_text())
        assert record["attention"]["components"]["transformer"]["calls"] == calls
        effective = record["settings"]["effective"]
        named = asked[1] if asked else STEP_CACHE["name"]
        assert effective["cache"] == (None if named == "none" else named)
        assert (effective["cache_config"] == CACHE_KEYS) is (calls == 2)
        assert "step_cache" not in effective["attention_backend_config"]["transformer"]


def test_compare_reads_the_step_cache_of_the_file(ditattn, options, tuned, tmp_path):
    path = tuned.path
    compare = ("compare", *options[1:5], *CALL, "--output-path", tmp_path, "--output-file-name", "x", "--no-probe",
               "--attention-backend", "rain_fusion_attn", "--attention-backend-config", path)  # fmt: skip
    for asked, said, caches in (
        ((), "--cache none leaves it off", [STEP_CACHE, None, STEP_CACHE]),
        (("--cache", "none"), "--cache asks for none", [None]),
    ):
        done = ditattn(*compare, *asked)
        assert done.status == 0, done.err
        assert said in done.err
        assert [one["step_cache"] for one in json.loads((tmp_path / "x.json").read_text())["settings"]] == caches


def test_a_step_cache_that_misses_the_target_ends_the_tune(ditattn, options, tmp_path, monkeypatch):
    monkeypatch.setattr("ditattn.cli.tune.probe", lambda *_: pytest.fail("the probe was run"))
    command = [*options, *CACHE, "--target-psnr", 400]
    done = ditattn(*command)
    assert done.status == 3
    said = [line for line in done.err.splitlines() if line.startswith("nothing was searched: pyramid_attention_broadcast")]
    assert len(said) == 1
    assert "alone, with dense attention, misses the target (PSNR at least 400 dB): PSNR" in said[0]
    assert not files(tmp_path / "out", "*.yaml")
    # known from now on
    monkeypatch.setattr(objective.Objective, "step_cache_alone", lambda _: pytest.fail("the cache was run alone again"))
    assert ditattn(*command).status == 3


def test_what_is_no_faster_than_the_step_cache_alone_is_nothing(ditattn, options, tmp_path, monkeypatch):
    """A sparse call is said to take as long as a dense one, and the clock to stand still."""
    faster = Sensitivity.from_readings.__func__
    monkeypatch.setattr(
        Sensitivity,
        "from_readings",
        classmethod(lambda cls, *a: replace(faster(cls, *a), call_time_shares=(1.0, 0.0), cached_time_share=0.5)),
    )
    judged = objective.Objective._judged
    monkeypatch.setattr(objective.Objective, "_judged", lambda *a: (*judged(*a)[:2], 0.5))
    done = ditattn(*options, *CACHE, "--target-psnr", 5, "--budget-runs", 2)
    assert done.status == 3
    assert "faster than dense and than the step cache, in 1 runs" in done.err
    assert "alone, with dense attention: PSNR" in done.err.splitlines()[-1]
    assert "2.00x, meets the target" in done.err.splitlines()[-1]
    assert not files(tmp_path / "out", "*.yaml")


def test_another_step_cache_is_another_question(ditattn, options, tmp_path):
    for asked in ((), CACHE, (*CACHE[:3], json.dumps({**CACHE_KEYS, "spatial_attention_block_skip_range": 3})), ("--cache", "none")):
        ditattn(*options, *asked, "--target-psnr", 400, "--budget-runs", 1)
    assert len(files(tmp_path / "out", "*.state.json")) == 3


WRONG = {
    "no target": ([], ["--target-psnr 30"]),
    "endless target": (["--target-psnr", "inf"], ["target_psnr", "finite"]),
    "dense backend": (["--target-psnr", 30, "--attention-backend", "fa"], ["fa is dense"]),
    "unknown backend": (["--target-psnr", 30, "--attention-backend", "rain"], ["no attention backend 'rain'"]),
    "a key that is tuned": (["--target-psnr", 30, "--attention-backend-config", "sparsity=0.5"], ["sparsity cannot be held fixed"]),
    "unknown key": (["--target-psnr", 30, "--attention-backend-config", "min_token=5"], ["did you mean 'min_tokens'"]),
    "too short to be sparse": (["--target-psnr", 30, "--attention-backend-config", "min_tokens=9999"], ["nothing ran sparse"]),
    "budget": (["--target-psnr", 30, "--budget-runs", 0], ["--budget-runs"]),
    "unknown cache": (["--target-psnr", 30, "--cache", "second_block"], ["no step cache 'second_block'", "first_block"]),
    "keys of no cache": (["--target-psnr", 30, "--cache-config", "threshold=1"], ["name it with --cache"]),
    "a cache that finds no layer": (["--target-psnr", 30, "--cache", "taylorseer"], ["found no layer", "cache_identifiers"]),
    "folder in the name": (["--target-psnr", 30, "--output-file-name", "a/b"], ["plain name"]),
}


def _without(options: list[Any], replaced: list[Any]) -> list[Any]:
    """The options but for those that `replaced` has too, with their values: the command takes each once."""
    places = [place for place, word in enumerate(options) if str(word).startswith("--") and word in replaced]
    return [word for place, word in enumerate(options) if place not in places and place - 1 not in places]


@pytest.mark.parametrize("case", WRONG)
def test_errors_in_one_line(case, ditattn, options):
    arguments, words = WRONG[case]
    done = ditattn(*_without(options, arguments), *arguments)
    assert done.status == 2, done.err
    assert len(done.error_lines) == 1, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.error_lines[0]
