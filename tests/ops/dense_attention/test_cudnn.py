"""The choice of cuDNN's attention on CUDA devices, on invented machines."""

from __future__ import annotations

import pytest
import torch

from ditattn.errors import BackendUnavailable
from ditattn.ops.dense_attention import TABLE, dense_attention, pure_torch
from ditattn.ops.table import CallFacts
from sparse_calls import draw

ROW = next(row for row in TABLE if row.name == "cudnn")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: torch.ones(*shape))
    monkeypatch.setattr(pure_torch, "run_cudnn", lambda *arguments: arguments[0])
    return monkeypatch


def test_taken_on_hopper(hopper: pytest.MonkeyPatch) -> None:
    assert pure_torch.why_not_cudnn() is None


def test_left_alone_elsewhere(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert "this GPU has 8.6" in (pure_torch.why_not_cudnn() or "")


def test_missing_library(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert pure_torch.why_not_cudnn() == "this torch has no cuDNN"


def test_a_refused_trial_is_quoted(hopper: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("No available kernel. Aborting execution.\nlong text")

    hopper.setattr(pure_torch, "run_cudnn", refuse)
    assert pure_torch.why_not_cudnn() == "cuDNN refused a small call: No available kernel. Aborting execution."


def test_first_choice_of_the_table_where_it_runs() -> None:
    assert next(row for row in TABLE if row.runs_on("cuda")) is ROW
    assert ROW.mismatch(CallFacts("cuda", torch.bfloat16, 128)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_row_says_why() -> None:
    assert ROW.refusal(CallFacts("cuda", torch.bfloat16, 128)) == "torch sees no CUDA device"
    query = draw(1, 30, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(BackendUnavailable, match="runs on cuda, not on cpu"):
        dense_attention(query, query, query, implementation="cudnn")
