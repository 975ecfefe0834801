"""The laboratory of fidelity on short, small clips: what it measures is what its table says, and nothing is measured twice."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import benchmarks.fidelity as bench
import numpy as np
import pytest
import torch
from benchmarks.fidelity_methods import (
    COMMON,
    METHODS,
    OracleBlocksImpl,
    RandomBlocksImpl,
    bounds_registered,
    methods_named,
    recall,
    recalls,
    row_masses,
)
from benchmarks.fidelity_table import MEASURED, append_line, draw, read_lines, rows, table

from ditattn.backends.registry import backend_names
from ditattn.backends.sparse import SparseAttentionMetadata
from ditattn.errors import ConfigError, DenseInStrictMode, UnsupportedCall
from ditattn.hosts.diffusers.demo_model import TRAINED
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.token_order import TokenOrder, token_order

# 8 x 12 x 16 tokens, 12 blocks
TINY = bench.Size(frames=8, height=48, width=64, steps=2)
GRID = (4, 9, 10)


def laboratory(folder: Path) -> bench.Laboratory:
    return bench.Laboratory(TINY, TRAINED, folder / "cache", folder / "lines.jsonl", lambda _: None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[bench.Laboratory, list]:
    """Two methods at one share, one clip."""
    lab = laboratory(tmp_path_factory.mktemp("laboratory"))
    with bounds_registered():
        return lab, lab.measure(methods_named(["permuted_sparse_attn", "oracle"]), [0.7], clips=1)


def test_the_share_is_met(measured: tuple[bench.Laboratory, list]) -> None:
    """Dense steps included."""
    _, lines = measured
    assert [line["method"] for line in lines] == ["permuted_sparse_attn", "oracle"]
    assert all(abs(line["ran"] - 0.7) <= bench.TOLERANCE for line in lines)
    assert all(line["frames"] == 8 and 10 < line["psnr"] < 60 and 0 < line["recall"] <= 1 for line in lines)
    # the judge sees square pictures only
    assert all(line["right"] is None for line in lines)


def test_what_is_there_does_not_run_again(measured: tuple[bench.Laboratory, list], monkeypatch: pytest.MonkeyPatch) -> None:
    lab, lines = measured
    assert read_lines(lab.results) == lines
    again = laboratory(lab.results.parent)
    monkeypatch.setattr(bench, "run_clip", lambda *_, **__: pytest.fail("it ran again"))
    methods = methods_named(["permuted_sparse_attn", "oracle"])
    assert again.measure(methods, [0.7], clips=1) == lines
    assert read_lines(lab.results) == lines
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        replace(again, size=replace(TINY, steps=3)).measure(methods, [0.7], clips=1)
    with pytest.raises(pytest.fail.Exception, match="ran again"):
        again.measure(methods, [0.7], clips=1, anew=True)


def test_further_clips_run_at_the_sparsity_of_the_first(measured: tuple[bench.Laboratory, list], monkeypatch: pytest.MonkeyPatch) -> None:
    lab, (line, _) = measured
    asked, answer = [], {name: line[name] for name in MEASURED}
    monkeypatch.setattr(bench.Laboratory, "sparsity_for", lambda *_: pytest.fail("calibrated again"))
    monkeypatch.setattr(bench.Laboratory, "_answer", lambda _, method, sparsity, number: asked.append((sparsity, number)) or answer)
    monkeypatch.setattr(bench, "append_line", lambda *_: None)
    laboratory(lab.results.parent).measure(methods_named(["permuted_sparse_attn"]), [0.7], clips=3)
    assert asked == [(line["sparsity"], 1), (line["sparsity"], 2)]


def test_a_share_that_the_dense_steps_exceed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"share of 0.4 is not possible: the dense steps compute 0.50"):
        laboratory(tmp_path).sparsity_for(METHODS[0], 0.4)


def test_a_run_in_which_nothing_is_dropped_is_no_measurement(measured: tuple[bench.Laboratory, list]) -> None:
    with pytest.raises(DenseInStrictMode, match="block_sparse_attn on transformer would run densely in every step: sparsity 0"):
        measured[0]._answer(methods_named(["block_sparse_attn"])[0], 0.0, 0)


@pytest.mark.parametrize("steps", [7, 34, 10**6])
@pytest.mark.parametrize("wanted", [0.2, 0.55, 0.9])
def test_calibration_finds_the_nearest_step(steps: int, wanted: float) -> None:
    def density(sparsity: float) -> float:
        return np.ceil(steps * (1 - sparsity**2)) / steps

    found = density(bench.nearest_sparsity(density, wanted, 0.002))
    assert abs(found - wanted) <= max(0.5 / steps, 0.002) + 1e-9


def test_methods_are_backends_with_keys_of_their_own() -> None:
    with bounds_registered():
        settings = {method.name: method.setting(0.5) for method in METHODS}
    assert settings["permuted_no_tail"].keys == {**COMMON, "tail": False, "sparsity": 0.5}
    assert settings["oracle"].backend == "oracle_blocks"
    # outside of the block the product does not know them
    assert "oracle_blocks" not in backend_names()


def test_an_unknown_method_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no method 'orakel'; did you mean 'oracle'\? There is rain_fusion_attn, "):
        methods_named(["random", "orakel"])


def call(impl: type, sparsity: float) -> tuple[torch.Tensor, torch.Tensor, BlockPlan, TokenOrder]:
    """Query, key, plan and order of a bound on a small grid."""
    query, key = torch.randn(2, 1, GRID[0] * GRID[1] * GRID[2], 2, 16).unbind(0)
    order = token_order("tile", GRID)
    with bounds_registered():
        config = methods_named(["oracle"])[0].setting(sparsity).config
    metadata = SparseAttentionMetadata(config=config, current_timestep=3, latent_shape=GRID)
    protected = order.protected_blocks(128, metadata.first_frame_sink, "cpu")
    return query, key, impl(2, 64, softmax_scale=1.0).plan(query, key, metadata, order, protected), order


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_the_oracle_keeps_at_least_the_mass_that_random_blocks_keep(sparsity: float) -> None:
    torch.manual_seed(1)
    query, key, oracle, order = call(OracleBlocksImpl, sparsity)
    torch.manual_seed(1)
    lots = call(RandomBlocksImpl, sparsity)[2]
    assert torch.equal(oracle.counts, lots.counts)
    masses = row_masses(query, key, order, torch.arange(order.length), 1.0)
    kept = [(masses * plan.to_mask().repeat_interleave(128, 2)[:, :, : order.length]).sum() for plan in (oracle, lots)]
    assert kept[0] > kept[1] * 1.05
    # rows keep a block more or less, all together what was asked
    blocks = oracle.num_key_blocks
    assert int(oracle.counts[0, 0].sum()) == round(blocks * blocks * (1 - sparsity))


def test_masses_are_those_of_a_plain_softmax() -> None:
    query, key = torch.randn(2, 1, 200, 2, 8).unbind(0)
    order = TokenOrder(torch.arange(199, -1, -1), torch.arange(199, -1, -1), (0, 0), (0, 200), 200)
    expected = torch.einsum("bshd,bthd->bhst", query.flip(1), key.flip(1)).softmax(-1)[:, :, :3]
    expected = torch.stack([expected[..., :128].sum(-1), expected[..., 128:].sum(-1)], -1)
    torch.testing.assert_close(row_masses(query, key, order, torch.arange(3), 1.0), expected)


def test_recall_is_the_mass_in_the_plan() -> None:
    query, key = torch.zeros(2, 1, 256, 2, 8).unbind(0)
    mask = torch.tensor([[True, False], [True, True]]).expand(1, 2, 2, 2)
    order = TokenOrder(None, None, (0, 0), (0, 256), 256)
    assert recall(query, key, BlockPlan.from_mask(mask, 256, 256), order, 1.0) == pytest.approx(0.75)


def test_padded_calls_are_refused() -> None:
    impl, order = OracleBlocksImpl(2, 64), TokenOrder(None, None, (0, 0), (0, 256), 256)
    tensors = torch.randn(3, 1, 256, 2, 64).unbind(0)
    with recalls() as found, pytest.raises(UnsupportedCall, match="without key padding"):
        impl._sparse(*tensors, BlockPlan.full(256, 256), torch.tensor([200]), order)
    assert found == []


def test_right_is_right_in_every_respect() -> None:
    scene = bench.scene_of(0)
    clip = bench.world.place(scene, random.Random(0))
    video, _ = bench.world.render([clip], torch.arange(17))
    frames = ((video[0].permute(1, 2, 3, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    assert bench.is_right(frames, scene) is True
    assert bench.is_right(frames[::-1], scene) is False
    assert bench.is_right(frames[:1], scene) is True
    assert bench.is_right(frames[:, :48], scene) is None


def test_captions_are_held_out_and_differ() -> None:
    scenes = [bench.scene_of(number) for number in range(40)]
    assert set(scenes) == set(bench.world.held_out_scenes())
    assert {scene.shape for scene in scenes[: bench.CLIPS]} == set(bench.world.SHAPES)


def line_of(method: str, share: float, psnr: float, **changes: object) -> dict:
    question = {"method": method, "backend": method, "keys": {}, "share": share, "prompt": "a", "seed": 0, "weights": "w", **vars(TINY)}
    answer = dict.fromkeys(MEASURED, True) | {"sparsity": 0.5, "ran": share + 0.002, "psnr": psnr, "ssim": psnr / 100, "recall": 0.75}
    return question | answer | changes


LINES = [
    line_of("poor", 0.4, 20.0, right=False),
    line_of("poor", 0.4, 22.0),
    line_of("poor", 0.4, 30.0, dense_right=False),
    line_of("good", 0.4, 35.5),
    line_of("poor", 0.6, 25.0, right=None, dense_right=None),
]


def test_the_table_says_what_the_lines_say() -> None:
    assert table(LINES).splitlines()[2:] == [
        "| `poor` | 0.60 | 0.602 | 25.0 | 25.0 | 0.250 | 0.250 | - | 0.750 |",
        "| `poor` | 0.40 | 0.402 | 22.0 | 20.0 | 0.220 | 0.200 | 1 of 2 | 0.750 |",
        "| `good` | 0.40 | 0.402 | 35.5 | 35.5 | 0.355 | 0.355 | 1 of 1 | 0.750 |",
    ]


def test_the_plot_has_two_curves_and_a_name_for_each_method() -> None:
    picture = ElementTree.fromstring(draw(LINES))
    curves = [part for part in picture if part.tag.endswith("polyline")]
    assert ["stroke-dasharray" in part.attrib for part in curves] == [False, True] * 2
    assert [len(part.attrib["points"].split()) for part in curves] == [2, 2, 1, 1]
    # two lines of rows() at 0.4 and 0.6: more PSNR is further up
    (_, low), (_, high) = (map(float, point.split(",")) for point in curves[0].attrib["points"].split())
    assert high < low
    assert {"poor", "good"} <= {part.text for part in picture}
    assert len(rows(LINES)) == 3


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "new" / "lines.jsonl"
    append_line(file, LINES[0])
    assert read_lines(file) == LINES[:1]
    file.write_text(file.read_text() + '{"method": "po', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lines.jsonl, line 2 is no measurement"):
        read_lines(file)
    file.write_text(json.dumps({"method": "poor"}) + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 1 lacks backend, keys"):
        read_lines(file)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple:
    """What `measure` is asked for."""
    asked: list[tuple] = []
    monkeypatch.setattr(sys, "argv", ["fidelity", *arguments])
    monkeypatch.setattr(bench.Laboratory, "measure", lambda lab, *arguments: asked.append((lab, *arguments)) or LINES)
    bench.main()
    return asked[0]


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab, methods, shares, clips, anew = run_main(monkeypatch)
    assert (methods, shares, clips, anew) == (list(METHODS), (0.66, 0.49, 0.38), 6, False)
    assert (lab.size, lab.model, lab.results) == (bench.Size(17, 64, 64, 24), TRAINED, bench.RESULTS)
    _, methods, shares, clips, _ = run_main(monkeypatch, "--quick", "--shares", "0.5")
    assert ([method.name for method in methods], shares, clips) == (list(bench.MAIN), [0.5], 2)
    capsys.readouterr()
    plot = tmp_path / "plot.svg"
    lab, *_ = run_main(monkeypatch, "--frames", "33", "--steps", "12", "--plot", str(plot))
    assert lab.size == bench.Size(33, 64, 64, 12)
    assert capsys.readouterr().out == table(LINES) + "\n"
    assert plot.read_text() == draw(LINES)


def test_the_command_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="fidelity: no method 'rain'; did you mean"):
        run_main(monkeypatch, "--methods", "rain")
