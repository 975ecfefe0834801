"""The Triton kernel without a GPU: start order, tiles, its variants in the interpreter, and code for every architecture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cases import SPARSE_CASES
from ditattn.errors import BackendUnavailable
from ditattn.ops import triton_targets
from ditattn.ops.block_sparse_attention import TABLE, block_sparse_attention
from ditattn.ops.block_sparse_attention.tiles import SHARED_MEMORY_BYTES, Tiles, architecture, tiles_for
from ditattn.ops.block_sparse_attention.tiles import TABLE as TILES
from ditattn.ops.table import CallFacts
from ditattn.packages import TRITON
from fresh_python import child, environment
from sparse_calls import draw

needs_triton = pytest.mark.skipif(TRITON.missing(), reason=TRITON.sentence())
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """What the interpreter runs of an op's contract.

    Attributes:
        chosen: an expression for pytest's -k.
        rest: one for what of it is left to `make test-all`: products of which the others have every two values meet.
        cases: the test that runs the cases, if there are any.
        fewest: fewer tests than pass of the quick part, of the rest and in the second type.
    """

    chosen: str
    rest: str
    cases: str | None
    fewest: dict[str, int]


# The log-sum-exp test judges outputs too, so plain calls run in one type on a few cases only
PLAIN = "test_error_is_in_proportion and (-float16- or not (odd or uneven and causal))"
# Many small programs, as for 640 tokens in blocks of 7, are what the interpreter is slowest at
SUITES = {
    "block_sparse_attention/test_contract.py": Suite(
        f"triton and not ({PLAIN})",
        "test_an_order_per_head and not shared",
        "test_log_sum_exp",
        {"quick": 60, "rest": 30, "second type": 60},
    ),
    "block_sparse_attention/test_tail.py": Suite(
        "triton",
        "test_a_tail_in_another_order and not grouped",
        "test_error_is_in_proportion",
        {"quick": 40, "rest": 30, "second type": 70},
    ),
    "block_mean/test_contract.py": Suite(
        "triton and not 640 and not 300-7",
        "test_layouts and not (80 and -float32- or odd and -bfloat16-) or 127-7 or 128-7 "
        "or order and (transposed-triton-float32 or padded-triton-bfloat16)",
        None,
        {"quick": 40, "rest": 30, "second type": 30},
    ),
}
# what a case asks for and how a data type is rounded are two rules: with the second one of the two types, a few cases suffice
SECOND_TYPE = "-float16-"
FEW = "odd or test_token_order or test_keeping"
# values of every kind are there at head size 64, and head size 128 is there with one kind; all of these run in the second type
LARGE = "data and 128"
# so are what a case asks for and the tail: in the quick part a case runs with a tail or without one, in turn
WITHOUT_TAIL = frozenset(str(case) for number, case in enumerate(SPARSE_CASES) if case.causal or number % 2 == 0)
WITH_TAIL = frozenset(map(str, SPARSE_CASES)) - WITHOUT_TAIL


def _left_out(suite: str, part: str) -> list[str]:
    """Options that leave the cases of the other part out."""
    if part == "second type":
        return []
    with_tail = suite.endswith("test_tail.py")
    names = WITHOUT_TAIL if with_tail == (part == "quick") else WITH_TAIL
    place = (HERE.parent / suite).relative_to(HERE.parents[2])
    test = "test_error_is_in_proportion_to_torch" if with_tail else "test_log_sum_exp"
    return [f"--deselect={place}::{test}[triton-{'tail, ' if with_tail else ''}{name}-" for name in sorted(names)]


def _chosen(suite: Suite, part: str) -> str:
    if part == "second type":
        return f"{suite.chosen} and {SECOND_TYPE} and not ({FEW})"
    first = f"{suite.chosen} and (not {SECOND_TYPE} or {FEW}) and not ({LARGE})"
    rest = suite.rest if suite.cases is None else f"{suite.rest} or {suite.cases}"
    return f"{first} and not ({suite.rest})" if part == "quick" else f"{first} and ({rest})"


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("part", ["quick", *(pytest.param(part, marks=pytest.mark.long) for part in ("rest", "second type"))])
@pytest.mark.parametrize("suite", SUITES)
def test_contract_in_the_interpreter(suite: str, part: str) -> None:
    """The contract suite of the op on its Triton row."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE.parent / suite), "-k", _chosen(SUITES[suite], part)]
    done = child([*command, *_left_out(suite, part)], interpreted=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed > SUITES[suite].fewest[part]
    assert "skipped" not in done.stdout.splitlines()[-1]


@needs_triton
def test_variants_in_the_interpreter() -> None:
    """Tensor descriptors and steps of half a block, which the contract suite's tiles do not use."""
    done = child([str(HERE / "triton_variants.py")], interpreted=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert len(json.loads(done.stdout)) == 10


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[] if arch == 90 else pytest.mark.long) for arch in sorted({arch for arch, _ in TILES})]
)
def test_every_configuration_compiles_without_spilling(arch: int) -> None:
    """For a real target and without a GPU: every head size of the architecture, plain, with a causal mask and with a tail."""
    done = child([str(HERE / "triton_compile.py"), str(arch)], interpreted=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 3 * 4
    for row in rows:
        # up to six registers where tokens stand in another order, whose numbers are needed before the loops and after them, not in them
        assert row["stack_bytes"] <= (24 if row["options"] == "tail" else 0), row
        assert row["local_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_MEMORY_BYTES[arch], row
        assert row["matrix_instruction"] in row["ptx_instructions"], row
        assert ("cp.async.bulk.tensor" in row["ptx_instructions"]) == tiles_for((arch // 10, arch % 10), row["head_dim"]).descriptors


def test_hopper_and_data_centre_blackwell_use_descriptors_and_the_others_do_not() -> None:
    assert {arch for (arch, _), tiles in TILES.items() if tiles.descriptors} == {90, 100}


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), 80), ((8, 6), 86), ((8, 9), 86), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 120), ((13, 0), 86), (None, 86)],
)
def test_every_capability_has_tiles(capability: tuple[int, int] | None, arch: int) -> None:
    assert architecture(capability) == arch
    for head_dim in (32, 64, 96, 128):
        tiles = tiles_for(capability, head_dim)
        assert isinstance(tiles, Tiles)
        assert 128 % tiles.keys == 0


@needs_triton
def test_long_rows_start_first_and_neighbours_of_a_head_stay_together() -> None:
    from ditattn.ops.block_sparse_attention.triton import start_order

    counts = torch.tensor([[[9, 2, 3, 8], [0, 3, 2, 15]]], dtype=torch.int32)
    assert start_order(counts, 1, 2, False).tolist() == [0, 3, 7, 1, 2, 5, 6, 4]
    assert start_order(counts, 2, 2, False).tolist() == [0, 3, 7, 8, 11, 15, 1, 2, 5, 6, 9, 10, 13, 14, 4, 12]
    # a causal row sees no more than its own number of blocks
    assert start_order(counts, 1, 2, True).tolist() == [3, 7, 1, 2, 5, 6, 0, 4]


@needs_triton
@pytest.mark.parametrize("shared", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_start_order_names_every_row_once(shared: tuple[int, int]) -> None:
    from ditattn.ops.block_sparse_attention.triton import start_order

    counts = torch.randint(0, 40, (*shared, 7), dtype=torch.int32)
    assert sorted(start_order(counts, 2, 3, False).tolist()) == list(range(42))


def test_without_a_gpu_the_rows_say_why() -> None:
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("a GPU or the interpreter is at hand")
    on_cuda, on_cpu = (row for row in TABLE if row.name == "triton")
    if not TRITON.missing():
        assert on_cuda.refusal(CallFacts("cuda", torch.bfloat16, 128)) == "torch sees no CUDA device"
        assert "TRITON_INTERPRET=1" in (on_cpu.refusal(CallFacts("cpu", torch.bfloat16, 128)) or "")
    assert not on_cpu.automatic
    assert "takes bfloat16, float16, not float32" in (on_cuda.mismatch(CallFacts("cuda", torch.float32, 128)) or "")
    query = draw(1, 130, 1, 32, dtype=torch.bfloat16)
    from ditattn.plan.block_plan import BlockPlan

    with pytest.raises(BackendUnavailable, match=r"'triton' was asked for.*Possible here: .*torch"):
        block_sparse_attention(query, query, query, BlockPlan.full(130, 130), implementation="triton")


@pytest.mark.parametrize(("capability", "text"), [((7, 5), "needs compute capability 8.0 or newer, this GPU has 7.5"), ((9, 0), None)])
def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], text: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert triton_targets.why_not_cuda() == text


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, ditattn, ditattn.ops.block_sparse_attention, ditattn.ops.block_mean; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(interpreted=False)).returncode == 0
