"""The registry is open: the package of docs/adding_a_backend.md works as ours do, and broken packages disturb nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="a backend serves in its pipelines")

import ditattn
import tiny_pipelines
from ditattn.backends.registry import BACKENDS, backend_names, left_out, load_backend, parse_backend_name, usable_backends
from ditattn.backends.setting import Setting
from ditattn.compare.setting import Clip
from ditattn.errors import (
    BackendUnavailable,
    ConfigError,
    DenseInStrictMode,
    UnknownBackend,
    UnknownKey,
    UnsupportedCall,
    UnsupportedHeadSize,
)
from ditattn.hosts.diffusers.workload import PipelineWorkload
from foreign_package import BROKEN, on_path, write_broken_package, write_documented_package
from tiny_pipelines import TinyPipeline
from tiny_pipelines.wan import transformer

ROOT = Path(__file__).resolve().parents[2]

NAME, PLAIN = "nearest_attn", "plain_attn"
SPARSE = {"sparsity": 0.5, "skip_first_steps": 0, "min_tokens": 0}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site_packages")
    write_documented_package(folder)
    return folder


@pytest.fixture
def _installed(package: Path) -> Iterator[None]:
    with on_path(package):
        yield


@pytest.fixture(scope="module")
def wan() -> TinyPipeline:
    return tiny_pipelines.wan()


def ran(tiny: TinyPipeline, **config: Any) -> Any:
    with ditattn.install(tiny.pipe, NAME, **{**SPARSE, **config}) as handle:
        tiny.run(2)
    return handle.report().components["transformer"]


# the package of the page


@pytest.mark.usefixtures("_installed")
def test_its_name_is_registered_as_sparse() -> None:
    assert backend_names() == (*BACKENDS, NAME, PLAIN)
    assert parse_backend_name("Nearest_Attn") == NAME
    backend = load_backend(NAME)
    assert backend.is_sparse
    assert backend.head_sizes == ()
    assert backend in usable_backends()
    assert left_out() == ()


def test_without_the_package_there_is_no_such_name() -> None:
    assert NAME not in backend_names()
    with pytest.raises(UnknownBackend, match="no attention backend 'nearest_attn'; did you mean"):
        load_backend(NAME)


@pytest.mark.usefixtures("_installed")
def test_installed_strictly_it_is_really_sparse(wan: TinyPipeline) -> None:
    native = wan.run(2)
    with ditattn.install(wan.pipe, NAME, strict=True, first_frame_sink=False, **SPARSE) as handle:
        out = wan.run(2)
    report = handle.report().components["transformer"]
    from my_package.nearest import nearest_blocks  # type: ignore[import-not-found]

    # 1400 tokens, 11 blocks, 6 of them near enough
    plan = nearest_blocks(1400, sparsity=0.5, sink_blocks=1, protected=torch.zeros(11, dtype=torch.bool))
    plan.check(1, 1)
    assert report.dense == 0
    assert report.sparse == report.calls > 0
    assert report.sparse_density == pytest.approx(plan.density())
    assert plan.density() < 0.7
    assert not torch.equal(out, native)
    torch.testing.assert_close(wan.run(2), native, rtol=0, atol=0)


@pytest.mark.usefixtures("_installed")
def test_its_own_key_reaches_the_selection(wan: TinyPipeline) -> None:
    few, many = (ran(wan, first_frame_sink=False, sink_blocks=number) for number in (0, 5))
    assert few.config["sink_blocks"] == 0
    assert few.sparse_density < many.sparse_density


@pytest.mark.usefixtures("_installed")
def test_wrong_keys_and_values_are_named(wan: TinyPipeline) -> None:
    with pytest.raises(UnknownKey, match="unknown key 'sink_block'; did you mean 'sink_blocks'"):
        ditattn.install(wan.pipe, NAME, sink_block=2)
    with pytest.raises(ConfigError, match=r"sink_blocks: .*greater than or equal to 0"):
        ditattn.install(wan.pipe, NAME, sink_blocks=-1)
    with pytest.raises(UnknownKey, match="sink_blocks"):
        ditattn.install(wan.pipe, "rain_fusion_attn", sink_blocks=2)


@pytest.mark.usefixtures("_installed")
def test_strict_raises_where_a_call_would_run_densely(wan: TinyPipeline) -> None:
    masked = tiny_pipelines.flux_with_hidden_image_tokens()
    with ditattn.install(masked.pipe, NAME, strict=True, **SPARSE), pytest.raises(DenseInStrictMode, match="mask with gaps"):
        masked.run(1)
    # diffusers' call tells no number of steps, so a share of them is unknown
    with ditattn.register(strict=True, **{**SPARSE, "skip_first_steps": "20%"}):
        wan.pipe.transformer.set_attention_backend(NAME)
        with pytest.raises(DenseInStrictMode, match="number of steps unknown"):
            wan.run(1)
        wan.pipe.transformer.reset_attention_backend()


@pytest.mark.usefixtures("_installed")
def test_the_head_size_is_refused_at_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_backend(NAME), "head_sizes", (32, 64))
    with pytest.raises(UnsupportedHeadSize, match="nearest_attn supports head sizes 32, 64, not 24"):
        ditattn.install(transformer(attention_head_dim=24), NAME)


@pytest.mark.usefixtures("_installed")
def test_registered_it_runs_through_set_attention_backend(wan: TinyPipeline) -> None:
    with ditattn.install(wan.pipe, NAME, **SPARSE, sink_blocks=2):
        expected = wan.run(2)
    with ditattn.register(**SPARSE, sink_blocks=2) as registration:
        wan.pipe.transformer.set_attention_backend(NAME)
        out = wan.run(2)
        wan.pipe.transformer.reset_attention_backend()
    assert torch.equal(out, expected)
    assert registration.report().components["WanTransformer3DModel"].sparse > 0


@pytest.mark.usefixtures("_installed")
def test_the_probe_tries_it(wan: TinyPipeline) -> None:
    arguments = {**wan.arguments, "num_inference_steps": 1}
    (readings,) = PipelineWorkload(wan.pipe, lambda _: arguments).probe([Setting.parse(NAME, SPARSE)], Clip("", 0))
    assert readings
    assert all(0 < cell.density < 1 and cell.error > 0 and cell.dropped_mass > 0 for cell in readings)


@pytest.mark.usefixtures("_installed")
def test_a_kernel_of_its_own_is_exact_and_counted(wan: TinyPipeline) -> None:
    assert not load_backend(PLAIN).is_sparse
    native = wan.run(2)
    with ditattn.install(wan.pipe, PLAIN, strict=True) as handle:
        torch.testing.assert_close(wan.run(2), native, rtol=0, atol=1e-4)
    report = handle.report().components["transformer"]
    assert report.dense_reasons == {"dense backend": report.calls}
    assert report.calls == 8
    padded = tiny_pipelines.hunyuan_video()
    with ditattn.install(padded.pipe, PLAIN), pytest.raises(UnsupportedCall, match="plain_attn honours neither"):
        padded.run(1)


@pytest.mark.usefixtures("_installed")
def test_a_sparse_one_that_says_nothing_is_counted_as_that(wan: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load_backend(NAME)

    class Silent(backend.impl_cls):  # type: ignore[name-defined, misc]
        def _note(self, record: Any) -> None:
            """Says nothing."""

    monkeypatch.setattr(backend, "impl_cls", Silent)
    report = ran(wan)
    assert report.dense_reasons == {"the backend does not say what it ran": report.calls}
    with ditattn.install(wan.pipe, NAME, strict=True, **SPARSE), pytest.raises(DenseInStrictMode, match="does not say"):
        wan.run(1)


FRESH = """
import json
from ditattn import AttentionBackendEnum
from ditattn.backends.registry import load_backend
member = AttentionBackendEnum.NEAREST_ATTN
print(json.dumps([str(member), member.is_sparse, load_backend(member).get_enum() is member, list(map(str, AttentionBackendEnum))]))
"""


def test_a_fresh_process_has_it_in_the_enumeration(package: Path) -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(package)])
    done = subprocess.run([sys.executable, "-c", FRESH], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [NAME, True, True, [*BACKENDS, NAME, PLAIN]]


# packages that cannot be used


@pytest.fixture
def _broken(tmp_path: Path) -> Iterator[None]:
    write_broken_package(tmp_path)
    write_documented_package(tmp_path)
    with on_path(tmp_path):
        yield


REASONS = {
    "gone_attn": "does not load: ModuleNotFoundError: No module named 'broken_package.no_such_module'",
    "raising_attn": "does not load: RuntimeError: no licence found",
    "lacking_attn": "does not load: AttributeError: ",
    "wrong_attn": "broken_package.things:NotABackend is not a subclass of ditattn.AttentionBackend",
    "misnamed_attn": "broken_package.things:MisnamedBackend has name = 'other_name', not 'misnamed_attn'",
    "operating_attn": "broken_package.things:OperatingBackend has ops that do not exist: no_such_operation",
    "unformed_attn": "this is no target does not load: ",
    "torch_sdpa": "the name is taken by ditattn.backends.torch_sdpa:TorchSDPABackend",
    "Shouting_Attn": "its name must be of lower-case letters, digits and underscores, as nearest_attn",
}


@pytest.mark.usefixtures("_broken")
def test_what_cannot_be_used_is_left_out_with_its_reason() -> None:
    assert [backend.name for backend in usable_backends()] == [*BACKENDS, NAME, PLAIN]
    found = {one.name: one for one in left_out()}
    assert set(found) == set(REASONS) == set(BROKEN)
    for name, one in found.items():
        assert (one.package, one.target) == ("broken_package", BROKEN[name])
        assert REASONS[name] in one.reason
        assert "\n" not in one.reason
        assert one.sentence().startswith(f"'{name}' of package broken_package is left out: ")


@pytest.mark.usefixtures("_broken")
def test_named_it_is_refused_in_a_sentence(wan: TinyPipeline) -> None:
    for name, reason in REASONS.items():
        if name == "torch_sdpa":
            assert load_backend(name).__module__ == "ditattn.backends.torch_sdpa"
            continue
        expected = UnknownBackend if name == "Shouting_Attn" else BackendUnavailable
        with pytest.raises(expected) as error:
            ditattn.install(wan.pipe, name)
        assert name in str(error.value)
        assert reason in str(error.value)


@pytest.mark.usefixtures("_broken")
def test_the_others_are_not_disturbed(wan: TinyPipeline) -> None:
    assert ran(wan).sparse > 0
    with ditattn.register(**SPARSE) as registration:
        wan.pipe.transformer.set_attention_backend("rain_fusion_attn")
        wan.run(1)
        wan.pipe.transformer.reset_attention_backend()
    assert registration.report().components["WanTransformer3DModel"].sparse > 0


@pytest.mark.usefixtures("_broken")
def test_register_says_which_keys_there_are() -> None:
    with pytest.raises(UnknownKey, match="did you mean 'sparsity'"):
        ditattn.register(sparcity=0.5)
