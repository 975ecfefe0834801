"""`ditattn backends`: what it says agrees with the tables, and every refusal is explained."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from ditattn.backends.registry import AttentionBackendEnum, load_backend
from ditattn.devices import DEVICES, find_device
from ditattn.ops import block_estimate, cpu_library, preference
from ditattn.ops.table import CallFacts, choose
from ditattn.packages import ATTENTIONS, MINDIESD, SGL_KERNEL_NPU, TORCH_NPU


@pytest.fixture
def listing(ditattn):
    done = ditattn("backends", "--json")
    assert done.status == 0, done.err
    return json.loads(done.out)


def table(operation):
    module = importlib.import_module(f"ditattn.ops.{operation}")
    return module.TABLE + getattr(module, "PORTABLE", ())


def expected_keys():
    for device in DEVICES:
        for name in AttentionBackendEnum:
            backend = load_backend(name)
            for operation in backend.ops:
                named = backend.implementations_on(device) if operation == backend.ops[0] else ()
                for implementation in dict.fromkeys(row.name for row in table(operation)):
                    if not named or implementation in named:
                        yield device, str(name), operation, implementation


def test_every_backend_and_implementation_on_every_device_once(listing):
    keys = [(row["device"], row["backend"], row["operation"], row["implementation"]) for row in listing["backends"]]
    assert sorted(keys) == sorted(expected_keys())


def test_every_refusal_has_a_reason_and_every_missing_package_its_command(listing):
    for row in listing["backends"]:
        assert row["available"] == (row["reason"] is None), row
        if not row["available"]:
            assert len(row["reason"]) > 10
            assert not row["serves"]
    if TORCH_NPU.missing():
        for row in listing["backends"]:
            if row["device"] == "npu":
                assert TORCH_NPU.install in row["install"]
                assert "torch_npu" in row["reason"]
    providers = (SGL_KERNEL_NPU, ATTENTIONS, MINDIESD)
    if all(package.missing() for package in providers):
        laser = [row for row in listing["backends"] if (row["device"], row["backend"]) == ("npu", "laser_attn")]
        assert len(laser) == len(providers)
        for row in laser:
            assert all(package.sentence() in row["reason"] for package in providers)


def test_what_serves_is_what_is_chosen(listing):
    for device in DEVICES:
        for name in AttentionBackendEnum:
            backend = load_backend(name)
            for operation in backend.ops:
                rows = [
                    row
                    for row in listing["backends"]
                    if (row["device"], row["backend"], row["operation"]) == (device, str(name), operation) and row["serves"]
                ]
                if backend.why_not(find_device(device)) is not None:
                    assert rows == []
                    continue
                facts = CallFacts(device, torch.bfloat16, 64)
                named = backend.implementations_on(device) if operation == backend.ops[0] else ()
                # decided anew: the choice that is kept may be one made while another test pretended something
                chosen = choose.__wrapped__(table(operation), facts, named)
                assert [row["implementation"] for row in rows] == [chosen.name]


def test_every_backend_serves_on_the_cpu(listing):
    serving = {row["backend"] for row in listing["backends"] if row["device"] == "cpu" and row["serves"]}
    assert serving == {str(name) for name in AttentionBackendEnum}
    assert [device["reason"] for device in listing["devices"] if device["device"] == "cpu"] == [None]


@pytest.mark.skipif(cpu_library.problem() is not None, reason=f"no CPU kernels: {cpu_library.problem()}")
@pytest.mark.parametrize("preferred", ["cpu", "torch"])
def test_the_measured_choice_is_shown_with_its_numbers(ditattn, monkeypatch, preferred):
    facts = CallFacts("cpu", torch.bfloat16, 64)
    cpu_ms, torch_ms = (1.5, 2.5) if preferred == "cpu" else (2.5, 1.5)
    measured = preference.Measurement("this kind", cpu_ms, torch_ms)
    monkeypatch.setitem(preference._MEASURED, facts, measured)
    rows = json.loads(ditattn("backends", "--json", "--device", "cpu").out)["backends"]
    for backend in ("laser_attn", "block_sparse_attn", "rain_fusion_attn"):
        dense = {row["implementation"]: row for row in rows if (row["backend"], row["operation"]) == (backend, "dense_attention")}
        assert dense["cpu"]["note"] == f"measured here for this kind: cpu {cpu_ms:.2f} ms, torch {torch_ms:.2f} ms, so {preferred}"
        assert (dense["cpu"]["serves"], dense["torch"]["serves"]) == (preferred == "cpu", preferred == "torch")
        assert dense["cpu"]["available"]
    # where a backend insists on an implementation, or nothing was measured, there is nothing to say
    assert {row["implementation"] for row in rows if row["note"]} == {"cpu"}
    assert {row["operation"] for row in rows if row["note"]} == {"dense_attention"}
    text = ditattn("backends", "--device", "cpu").out
    number = next(line.split(") ")[0] for line in text.splitlines() if line.endswith(measured.sentence()))
    line = next(line.split() for line in text.splitlines() if line.startswith("cpu") and f"{number})" in line)
    assert line[1:] == ["laser_attn", "dense_attention", "serves" if preferred == "cpu" else "ready", f"{number})", "cpu"]


def test_the_estimate_of_block_sparse_attn_is_listed_with_what_does_it_elsewhere(listing):
    rows = [row for row in listing["backends"] if row["operation"] == "block_estimate"]
    assert {row["backend"] for row in rows} == {"block_sparse_attn"}
    for device in DEVICES:
        names = [row["implementation"] for row in rows if row["device"] == device]
        assert names == [row.name for row in block_estimate.TABLE] + ["torch"]
    assert [row["implementation"] for row in rows if row["device"] == "cpu" and row["serves"]] == ["torch"]


def test_the_table_for_people_loses_no_row_and_no_reason(ditattn, listing):
    done = ditattn("backends")
    assert done.status == 0
    assert "dense: torch_sdpa, fa, laser_attn\nsparse: block_sparse_attn, rain_fusion_attn, permuted_sparse_attn\n" in done.out
    lines = [line.split(maxsplit=3) for line in done.out.splitlines() if line.split(maxsplit=1)[:1] and line[0] != "("]
    notes = dict(line.split(") ", 1) for line in done.out.splitlines() if line.startswith("("))
    for row in listing["backends"]:
        place = [row["device"], row["backend"], row["operation"]]
        states = [rest[0] for *start, rest in ((*line[:3], line[3:]) for line in lines if len(line) == 4) if start == place]
        fitting = [state for state in states if row["implementation"] in state.replace(",", " ").split()]
        assert len(fitting) == 1, row
        if row["available"]:
            assert fitting[0].startswith("serves" if row["serves"] else "ready")
        else:
            assert notes[fitting[0].removeprefix("no ").split(")")[0]] == row["reason"]


def test_one_device(ditattn):
    done = ditattn("backends", "--json", "--device", "npu:0")
    assert {row["device"] for row in json.loads(done.out)["backends"]} == {"npu"}
    wrong = ditattn("backends", "--device", "toaster")
    assert wrong.status == 2
    assert len(wrong.error_lines) == 1
    assert "cpu, cuda, npu" in wrong.err


def test_one_backend_is_recommended(listing):
    assert {row["backend"] for row in listing["backends"] if row["recommended"]} == {"permuted_sparse_attn"}
