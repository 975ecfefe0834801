"""The choice of an implementation, on invented tables and facts."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ditattn.errors import BackendUnavailable, UnsupportedCall
from ditattn.ops import block_estimate, block_mean, block_sparse_attention, dense_attention, mx_linear, tail_estimate
from ditattn.ops.table import CallFacts, Implementation, Package, _warn_once, choose, choose_to_run, explain, load
from ditattn.packages import TRITON

ABSENT = Package("package_that_nobody_has", "the fast road", "pip install package_that_nobody_has")
FACTS = CallFacts("cpu", torch.float32, 64)


def runs() -> None:
    return None


def no_library() -> str:
    return "the library was not built: no compiler"


def row(name: str, **fields: object) -> Implementation:
    return Implementation(name, f"{__name__}:runs", **fields)


def reason(implementation: Implementation, facts: CallFacts = FACTS) -> str | None:
    return explain((implementation,), facts)[0].reason


def test_first_possible_row_is_taken() -> None:
    table = (row("gpu", devices=("cuda",)), row("other"), row("last"))
    assert choose(table, FACTS).name == "other"


def test_rows_that_are_not_automatic_run_only_by_name() -> None:
    table = (row("manual", automatic=False), row("portable"))
    assert choose(table, FACTS).name == "portable"
    assert choose(table, FACTS, ("manual",)).name == "manual"


@pytest.mark.parametrize(
    ("fields", "facts", "text"),
    [
        ({"devices": ("cuda", "npu")}, FACTS, "runs on cuda or npu, not on cpu"),
        ({"dtypes": ("bfloat16",)}, FACTS, "takes bfloat16, not float32"),
        ({"head_dims": (32, 128)}, FACTS, "takes head sizes 32, 128, not 64"),
        ({"honours": frozenset({"gqa"})}, CallFacts("cpu", torch.float32, 64, frozenset({"gqa", "causal"})), "does not honour causal"),
        ({"packages": (ABSENT,)}, FACTS, "pip install package_that_nobody_has"),
        ({"probe": "builtins:repr"}, FACTS, None),
    ],
)
def test_every_need_has_its_reason(fields: dict[str, object], facts: CallFacts, text: str | None) -> None:
    if "probe" in fields:
        fields = {"probe": f"{__name__}:no_library"}
        text = "no compiler"
    assert text in (reason(row("x", **fields), facts) or "")


def test_a_row_whose_needs_are_met_gives_no_reason() -> None:
    full = row("x", devices=("cpu",), dtypes=("float32",), head_dims=(64,), packages=(Package("torch", "", ""),), probe=f"{__name__}:runs")
    assert reason(full) is None


def test_nothing_possible_lists_every_reason() -> None:
    table = (row("gpu", devices=("cuda",)), row("half", dtypes=("float16",)))
    with pytest.raises(UnsupportedCall, match=r"cpu, float32, head size 64.*gpu: runs on cuda.*half: takes float16"):
        choose(table, FACTS)


@pytest.mark.parametrize("fields", [{"devices": ("cuda",)}, {"packages": (ABSENT,)}, {"probe": f"{__name__}:no_library"}])
def test_named_row_that_this_machine_cannot_run_is_unavailable(fields: dict[str, object]) -> None:
    with pytest.raises(BackendUnavailable, match=r"'wanted' was asked for.*Possible here: portable"):
        choose((row("wanted", **fields), row("portable")), FACTS, ("wanted",))


def test_named_row_that_refuses_the_call_is_unsupported() -> None:
    with pytest.raises(UnsupportedCall, match=r"takes float16, not float32\. Possible here: none"):
        choose((row("wanted", dtypes=("float16",)),), FACTS, ("wanted",))


def test_unknown_name() -> None:
    with pytest.raises(UnsupportedCall, match="no implementation named 'x'; there is a, b"):
        choose((row("a"), row("b")), FACTS, ("x",))


def test_rows_may_share_a_name_for_different_devices() -> None:
    table = (row("flash", devices=("cpu",), dtypes=("float32",)), row("flash", devices=("cuda",), dtypes=("float16",)))
    assert choose(table, FACTS, ("flash",)).devices == ("cpu",)
    assert choose(table, CallFacts("cuda", torch.float16, 64), ("flash",)).devices == ("cuda",)
    with pytest.raises(UnsupportedCall, match="takes float16, not float32"):
        choose(table, CallFacts("cuda", torch.float32, 64), ("flash",))


def test_missing_parent_of_a_dotted_package_counts_as_missing() -> None:
    assert Package("package_that_nobody_has.part", "", "").missing()
    assert not Package("torch.nn", "", "").missing()


def test_an_old_version_counts_as_missing_and_is_called_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_kernels").mkdir()
    (tmp_path / "some_kernels" / "__init__.py").write_text("raise ImportError('it is looked for, not imported')")
    monkeypatch.syspath_prepend(tmp_path)
    package = Package("some_kernels", "kernels", "pip install 'some-kernels>=2'", oldest=("2", "newer/part.py"))
    assert package.missing()
    assert package.sentence() == "package 'some_kernels' is older than 2 (kernels): pip install 'some-kernels>=2'"
    (tmp_path / "some_kernels" / "newer").mkdir()
    (tmp_path / "some_kernels" / "newer" / "part.py").touch()
    assert not package.missing()
    absent = Package("package_that_nobody_has", "kernels", "pip install it", oldest=("2", "newer/part.py"))
    assert absent.missing()
    assert absent.sentence() == "package 'package_that_nobody_has' is missing (kernels): pip install it"


def test_a_triton_counts_as_missing_where_it_lacks_what_the_kernels_import() -> None:
    pytest.importorskip("triton")
    assert TRITON.missing() == (importlib.util.find_spec("triton.tools.tensor_descriptor") is None)


def test_load_returns_the_function() -> None:
    assert load(Implementation("x", "math:sqrt"))(4) == 2


TABLES = (
    dense_attention.TABLE,
    block_sparse_attention.TABLE,
    block_mean.TABLE,
    block_estimate.TABLE,
    block_estimate.PORTABLE,
    tail_estimate.TABLE,
    mx_linear.TABLE,
)
NAMED = ("target", "machine", "probe", "limits", "preference")
ROWS = [pytest.param(row, id=f"{row.operation}-{row.name}-{'-'.join(row.devices)}") for table in TABLES for row in table]


@pytest.mark.parametrize("row", ROWS)
def test_every_function_that_a_row_names_exists_on_every_machine(row: Implementation) -> None:
    targets = [target for field in NAMED if (target := getattr(row, field))]
    for target in targets:
        module, _, attribute = target.partition(":")
        if module.endswith(".triton"):
            # the one module that cannot be imported without its package
            path = Path(block_sparse_attention.__file__).parents[1] / module.split(".")[-2] / "triton.py"
            assert f"\ndef {attribute}(" in path.read_text()
            continue
        found = getattr(importlib.import_module(module), attribute)
        answers = [getattr(found, question) for question in ("run", "machine", "probe", "limits")] if row.provider else [found]
        assert all(callable(answer) for answer in answers)
    assert not row.provider or targets == [row.target], "the provider answers for the other fields"


@pytest.mark.parametrize("row", ROWS)
def test_a_search_for_what_a_row_names_finds_it(row: Implementation) -> None:
    """No target is put together from parts: each stands as it is in the file of its table."""
    source = Path(importlib.import_module(f"ditattn.ops.{row.operation}").__file__ or "").read_text()
    for field in NAMED:
        target = getattr(row, field)
        assert target is None or f'"{target}"' in source


class Measured:
    """Stands for a self-measurement."""

    def __init__(self, preferred: str) -> None:
        self.preferred = preferred

    def sentence(self) -> str:
        return f"measured: {self.preferred}"


def prefers_portable(_: CallFacts) -> Measured:
    return Measured("portable")


def prefers_own(_: CallFacts) -> Measured:
    return Measured("own")


def test_a_measurement_may_deprioritise_a_row_and_is_shown() -> None:
    table = (row("own", preference=f"{__name__}:prefers_portable"), row("portable"))
    assert choose(table, FACTS).name == "portable"
    assert choose(table, FACTS, ("own",)).name == "own"
    assert explain(table, FACTS)[0].note == "measured: portable"
    assert choose((row("own", preference=f"{__name__}:prefers_own"), row("portable")), FACTS).name == "own"


def test_a_row_is_never_deprioritised_for_one_that_cannot_run() -> None:
    table = (row("own", preference=f"{__name__}:prefers_portable"), row("portable", dtypes=("float16",)))
    assert choose(table, FACTS).name == "own"


NPU_ROWS = (row("own", devices=("npu",), head_dims=(64,)), row("other", devices=("npu",), head_dims=(64,)), row("gpu", devices=("cuda",)))
WITH_SLOW = (*NPU_ROWS, row("portable", slow_on=("npu",)))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What is warned of; nothing was before."""
    choose_to_run.cache_clear()
    _warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "ditattn")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_row_that_is_slow_there_is_named_once_per_kind_of_call(warnings: Callable[[], list[str]]) -> None:
    for num_keys in (100, 200):
        assert choose_to_run(WITH_SLOW, CallFacts("npu", torch.float32, 80, num_keys=num_keys)).name == "portable"
    assert len(warnings()) == 1
    assert "slow on npu (npu, float32, head size 80). own, other: takes head sizes 64, not 80" in warnings()[0]
    choose_to_run(WITH_SLOW, CallFacts("npu", torch.float16, 80))
    assert len(warnings()) == 2


@pytest.mark.parametrize(
    ("device", "head_dim", "names"),
    [("npu", 64, ()), ("cpu", 80, ()), ("cuda", 80, ()), ("npu", 80, ("portable",)), ("npu", 80, ("own", "portable"))],
    ids=["a fast row serves", "cpu", "cuda", "by name", "second name"],
)
def test_no_warning_where_nothing_is_slow_or_it_was_asked_for(
    warnings: Callable[[], list[str]], device: str, head_dim: int, names: tuple[str, ...]
) -> None:
    choose_to_run(WITH_SLOW, CallFacts(device, torch.float32, head_dim), names)
    assert warnings() == []


def test_the_choice_for_a_report_does_not_warn(warnings: Callable[[], list[str]]) -> None:
    assert choose(WITH_SLOW, CallFacts("npu", torch.float32, 80)).name == "portable"
    assert warnings() == []


@pytest.mark.parametrize(("device", "count"), [("npu", 1), ("cpu", 0), ("cuda", 0)])
def test_plain_torch_for_a_sparse_call_is_slow_on_npus_only(warnings: Callable[[], list[str]], device: str, count: int) -> None:
    # kernels pad heads of up to 128
    row = choose_to_run(block_sparse_attention.TABLE, CallFacts(device, torch.float32, 256))
    assert row.name == "torch"
    assert len(warnings()) == count
    assert all(message.startswith("block_sparse_attention runs as 'torch', which is slow on npu") for message in warnings())
    if count:
        assert all(name in warnings()[0] for name in ("mask_torch_npu", "index_attentions", "counted_mindiesd"))
