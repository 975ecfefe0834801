"""ComfyUI's interface by recorded calls: what its own models ask of an attention override, asked again without ComfyUI.

`tests/comfyui_source` runs ComfyUI itself, and compares the recording, where a checkout is.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import re
import sys
import tomllib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import comfyui_calls
from comfyui_calls import Patcher
from ditattn.backends.base import CallRecord
from ditattn.backends.sparse import Reason
from ditattn.errors import BackendUnavailable, ConfigError, UnknownBackend, UnsupportedModel
from ditattn.hosts import comfyui as host
from ditattn.hosts.comfyui import families
from ditattn.hosts.comfyui import handle as handle_module
from ditattn.hosts.comfyui.patched_model import OVERRIDE
from ditattn.hosts.comfyui.picture import DENSE_COLOUR, SPARSE_COLOUR, UNKNOWN_COLOUR
from ditattn.hosts.comfyui.sigma_clock import SigmaClock
from ditattn.runtime.forward import running
from ditattn.runtime.key_padding import OTHER_MASK
from ditattn.runtime.metadata import build_attn_metadata
from ditattn.runtime.step import Step

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = comfyui_calls.recordings()
KEYS = {"min_tokens": 0, "sparsity": 0.75, "skip_first_steps": 1}
# a sigma of each step
SIGMAS = comfyui_calls.SCHEDULE[:-1].tolist()


@pytest.fixture(params=RECORDINGS)
def recording(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = RECORDINGS[request.param]
    return found


def component(handle: host.Handle) -> Any:
    report = handle.report()
    assert len(report.components) == 1
    return next(iter(report.components.values()))


def self_attention(recording: dict[str, Any]) -> list[int]:
    """Numbers of the calls that look at the whole picture."""
    lengths = [[call["args"][number]["shape"][-2] for number in (0, 1)] for call in recording["calls"]]
    return [number for number, (queries, keys) in enumerate(lengths) if queries == keys >= 1280]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_family_is_recorded() -> None:
    assert {recording["class"] for recording in RECORDINGS.values()} == {
        name for family in families.FAMILIES for name in family.transformer_classes
    }


@pytest.mark.parametrize(
    ("name", "grid", "prefix", "suffix"),
    [
        ("Wan", (5, 16, 16), 0, 0),
        ("HunyuanVideo", (5, 16, 16), 0, 7),
        ("Flux", (1, 40, 32), 7, 0),
        ("Qwen-Image", (1, 40, 32), 7, 0),
        ("LTX-Video", (5, 16, 16), 0, 0),
    ],
)
def test_where_the_picture_stands(name: str, grid: tuple[int, int, int], prefix: int, suffix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests/comfyui_source finds it by changing a token of the picture."""
    patched, handle = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    seen: list[Any] = []
    attend = handle.attend

    def watch(forward: Any, call: Any) -> Tensor:
        seen.append(forward.layout)
        return attend(forward, call)

    monkeypatch.setattr(handle, "attend", watch)
    comfyui_calls.forward(patched, RECORDINGS[name], SIGMAS[1])
    assert {(layout.grid, layout.num_prefix_tokens, layout.num_suffix_tokens) for layout in seen} == {(grid, prefix, suffix)}


@pytest.mark.parametrize("backend", host.backend_choices())
def test_sparsity_zero_is_native_and_sparse_calls_are_our_own_path(
    recording: dict[str, Any], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = comfyui_calls.forward(Patcher(), recording, SIGMAS[1])
    patched, handle = host.attach(Patcher(), backend, {**KEYS, "sparsity": 0.0})
    close(comfyui_calls.forward(patched, recording, SIGMAS[1]), native)
    assert component(handle).dense_reasons == {Reason.SPARSITY_ZERO: len(self_attention(recording))}

    patched, handle = host.attach(Patcher(), backend, KEYS)
    expected: list[Tensor] = []
    attend = handle.attend

    def watch(forward: Any, call: Any) -> Tensor:
        out = attend(forward, call)
        if forward.layer is not None:
            expected.append(call.answer(_our_own(handle, forward, call.tensors())))
        return out

    monkeypatch.setattr(handle, "attend", watch)
    found = comfyui_calls.forward(patched, recording, SIGMAS[1])
    numbers = self_attention(recording)
    assert len(expected) == len(numbers) == 2
    for number, own in zip(numbers, expected, strict=True):
        torch.testing.assert_close(found[number], own, rtol=0, atol=0)
        assert (found[number] - native[number]).abs().max() > 1e-2
    others = [number for number in range(len(found)) if number not in numbers]
    close([found[number] for number in others], [native[number] for number in others])
    assert component(handle).sparse_density < 0.95


def _our_own(handle: host.Handle, forward: Any, tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The same call without ComfyUI."""
    records: list[CallRecord] = []
    _, _, heads, head_size = tensors[0].shape
    impl = handle.backend.get_impl_cls()(heads, head_size, layer_index=forward.layer, observer=records.append)
    metadata = build_attn_metadata(handle.backend.get_builder_cls()(), handle.setting.config, Step(1, 4, "none"), forward.layout)
    out: Tensor = impl.forward(*tensors, metadata)
    assert records[0].plan is not None
    return out


def test_first_steps_are_dense_by_comfyuis_own_attention_and_the_report_counts() -> None:
    recording = RECORDINGS["Wan"]
    patched, handle = host.attach(Patcher(), "permuted_sparse_attn", KEYS)

    def run() -> None:
        for sigma in SIGMAS:
            for branch in range(2):
                comfyui_calls.forward(patched, recording, sigma, uuids=[branch])

    close(comfyui_calls.forward(patched, recording, SIGMAS[0]), comfyui_calls.forward(Patcher(), recording, SIGMAS[0]))
    for _ in range(2):
        comfyui_calls.sampling(patched, run)
        ran = component(handle)
        # two layers, two branches, four steps of which one is dense; nothing of an earlier sampling
        assert (ran.calls, ran.sparse, ran.dense_reasons) == (16, 12, {"first steps": 4})
        assert ran.step_sources == {"sigmas": 8}
        assert (ran.steps_run, ran.schedule_steps) == (4, 4)


@pytest.mark.parametrize(
    ("sigma", "step"),
    [(1.0, 0), (0.75, 1), (0.5, 2), (0.25, 3), (0.9, 0), (0.51, 1), (0.1, 3), (0.0, 3), (1.2, 0), (0.75 * (1 + 5e-5), 1)],
)
def test_a_sigma_between_two_steps_belongs_to_the_one_before(sigma: float, step: int) -> None:
    options = {"sigmas": torch.tensor([sigma]), "sample_sigmas": comfyui_calls.SCHEDULE}
    assert SigmaClock().read(None, None, None, options) == Step(step, 4, "sigmas")


@pytest.mark.parametrize(
    "options", [{}, {"sigmas": torch.tensor([1.0])}, {"sigmas": torch.tensor([1.0]), "sample_sigmas": torch.tensor([0.0])}]
)
def test_without_a_schedule_the_step_is_unknown(options: dict[str, Any]) -> None:
    assert SigmaClock().read(None, None, None, options).index is None


def test_layers_have_the_numbers_of_their_blocks_where_comfyui_names_them() -> None:
    """A call that a node leaves out in one forward moves no other."""
    _, handle = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    blocks = [("double", 0), ("double", 1), ("single", 0), ("single", 0)]
    handle._seen = {}
    assert [handle._layer_number({"block_type": kind, "block_index": index}) for kind, index in blocks] == [0, 1, 2, 3]
    handle._seen = {}
    assert [handle._layer_number({"block_type": kind, "block_index": index}) for kind, index in blocks[1:]] == [1, 2, 3]
    handle.begin()
    assert [handle._layer_number({}) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
@pytest.mark.parametrize("more", [{}, {"scale": 0.3}, {"enable_gqa": True}, {"low_precision_attention": False}])
@pytest.mark.parametrize("step", [0, 1])
def test_every_form_of_a_call(skip_reshape: bool, skip_output_reshape: bool, more: dict[str, Any], step: int) -> None:
    heads = {"q": 4, "k": 2 if "enable_gqa" in more else 4}
    sizes = [[1, n, 1280, 32] if skip_reshape else [1, 1280, n * 32] for n in (heads["q"], heads["k"], heads["k"])]
    args = [*({"shape": size, "dtype": "float32"} for size in sizes), 4]
    call = {"args": args, "kwargs": {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape, **more}, "has_options": True}
    recording = {**RECORDINGS["Wan"], "calls": [call]}
    native = comfyui_calls.forward(Patcher(), recording, SIGMAS[step])
    patched, handle = host.attach(Patcher(), "rain_fusion_attn", {**KEYS, "sparsity": 0.05, "first_frame_sink": False})
    found = comfyui_calls.forward(patched, recording, SIGMAS[step])
    assert found[0].shape == native[0].shape
    ran = component(handle)
    assert (ran.dense, ran.sparse) == ((1, 0) if step == 0 else (0, 1))
    if step == 0:
        close(found, native)
    else:
        # all ten blocks are kept, since 0.05 of ten is none
        assert ran.sparse_density == 1
        close(found, native)


def test_an_argument_that_is_not_known_here_is_left_to_comfyui_and_counted() -> None:
    calls = [{**RECORDINGS["Wan"]["calls"][0], "kwargs": {"heads": 2, "sinks": 3}}]
    recording = {**RECORDINGS["Wan"], "calls": calls}
    patched, handle = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    close(comfyui_calls.forward(patched, recording, SIGMAS[1]), comfyui_calls.forward(Patcher(), recording, SIGMAS[1]))
    assert component(handle).dense_reasons == {f"{handle_module.UNKNOWN_ARGUMENT}: sinks": 1}


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (lambda keep: keep[None, None], None),
        (lambda keep: torch.where(keep, 0.0, LOWEST)[None, None], None),
        (lambda keep: torch.where(keep, 0.0, -math.inf)[None, None], None),
        (lambda keep: torch.where(keep, 0.0, -1.5)[None, None], OTHER_MASK),
        # the same for every query by its strides; a row for each, whatever it holds
        (lambda keep: keep.expand(len(keep), -1), None),
        (lambda keep: keep.expand(len(keep), -1).clone(), OTHER_MASK),
    ],
)
def test_masks_that_hide_padded_text_are_honoured_others_are_dense(mask: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = {**RECORDINGS["HunyuanVideo"], "calls": RECORDINGS["HunyuanVideo"]["calls"][-1:]}
    made = mask(torch.arange(1287) < 1283)
    attention = comfyui_calls.attention
    monkeypatch.setattr(comfyui_calls, "attention", lambda options, *args, **kwargs: attention(options, *args, **{**kwargs, "mask": made}))
    native = comfyui_calls.forward(Patcher(), recording, SIGMAS[1])
    patched, handle = host.attach(Patcher(), "rain_fusion_attn", {**KEYS, "sparsity": 0.0})
    close(comfyui_calls.forward(patched, recording, SIGMAS[1]), native)
    patched, handle = host.attach(Patcher(), "rain_fusion_attn", {**KEYS, "sparsity": 0.05, "first_frame_sink": False})
    close(comfyui_calls.forward(patched, recording, SIGMAS[1]), native)
    ran = component(handle)
    assert ran.dense_reasons == ({} if reason is None else {reason: 1})
    assert ran.sparse == (reason is None)


def test_a_mask_is_read_once_in_a_forward_and_kept_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    patched, _ = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    num_read: list[int] = []
    as_truths, attention = handle_module._as_truths, comfyui_calls.attention
    masks = [torch.zeros(1, 1, 1280), torch.zeros(1280, 1280), None]

    def counting(mask: Tensor) -> Tensor:
        num_read.append(mask.numel())
        return as_truths(mask)

    def masked(options: Any, *args: Any, **kwargs: Any) -> Tensor:
        return attention(options, *args, **{**kwargs, "mask": masks[0]})

    monkeypatch.setattr(handle_module, "_as_truths", counting)
    monkeypatch.setattr(comfyui_calls, "attention", masked)
    recording = {**RECORDINGS["Wan"], "calls": RECORDINGS["Wan"]["calls"][::2]}
    gone = [weakref.ref(mask) for mask in masks[:2]]
    for _ in range(3):
        comfyui_calls.forward(patched, recording, SIGMAS[1])
        masks.pop(0)
    assert num_read == [1280, 1280 * 1280]
    assert [one() for one in gone] == [None, None]


def _living_elements() -> int:
    gc.collect()
    return sum(found.numel() for found in gc.get_objects() if type(found) is Tensor)


def test_a_layer_keeps_no_tensors_of_a_call() -> None:
    """With queries, keys and values of every layer a large model would not fit the device."""
    recording = RECORDINGS["Wan"]
    patched, handle = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    before = _living_elements()
    for sigma in SIGMAS[:2]:
        comfyui_calls.forward(patched, recording, sigma)
    assert component(handle).dense_reasons == {"first steps": 2}
    assert _living_elements() - before < math.prod(recording["calls"][0]["args"][0]["shape"])


def test_a_sampling_leaves_no_residuals_behind() -> None:
    """What comes after it, the VAE, wants the memory."""
    recording, schedule = RECORDINGS["Wan"], torch.linspace(1, 0, 13)
    patched, handle = host.attach(Patcher(), "permuted_sparse_attn", {**KEYS, "residual": True})
    elements = math.prod(recording["calls"][0]["args"][0]["shape"])
    within: list[int] = []
    before = _living_elements()

    def run() -> None:
        for sigma in schedule[:2].tolist():
            comfyui_calls.forward(patched, recording, sigma, sample_sigmas=schedule)
        within.append(_living_elements() - before)

    comfyui_calls.sampling(patched, run)
    assert within[0] > elements
    assert _living_elements() - before < elements
    assert (component(handle).calls, component(handle).sparse) == (4, 2)


def test_two_models_of_one_class_are_told_apart() -> None:
    """A ControlNet may be of the model's own class."""
    patched, handle = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    for _ in range(2):
        comfyui_calls.forward(patched, RECORDINGS["Wan"], SIGMAS[1])
        patched.models.clear()
    report = handle.report()
    assert {name: one.sparse for name, one in report.components.items()} == {"WanModel": 2, "WanModel 2": 2}


def test_references_and_longer_videos_are_part_of_the_layout() -> None:
    class Wan:
        patch_size = (1, 2, 2)
        ref_conv = object()

    class Hunyuan:
        patch_size = (1, 2, 2)
        byt5_in = object()

    x, text = torch.zeros(1, 16, 5, 31, 32), torch.zeros(1, 7, 8)
    found = families._wan(Wan, {"x": x, "reference_latent": torch.zeros(1, 16, 32, 32), "time_dim_concat": torch.zeros(1, 16, 2, 31, 32)})
    assert (found.grid, found.num_prefix_tokens, found.num_suffix_tokens) == ((7, 16, 16), 256, 0)
    assert [grid.size for grid in found.further_grids] == [(1, 16, 16)]
    found = families._hunyuan_video(Hunyuan, {"x": x, "context": text, "txt_byt5": text, "ref_latent": torch.zeros(1, 16, 1, 32, 32)})
    assert (found.grid, found.num_prefix_tokens, found.num_suffix_tokens) == ((5, 16, 16), 256, 14)
    flux = type("Flux", (), {"patch_size": 2})
    found = families._flux(flux, {"x": x[:, :, 0], "context": text, "ref_latents": [torch.zeros(1, 16, 16, 20)]})
    assert (found.grid, found.num_prefix_tokens, found.num_suffix_tokens) == ((1, 16, 16), 7, 80)


def test_tokens_that_nobody_announced_make_a_call_dense() -> None:
    """A patch of another node may lengthen the sequence."""
    call = RECORDINGS["Wan"]["calls"][0]
    longer = {**call, "args": [{"shape": [1, 1290, 128], "dtype": "float32"}] * 3}
    recording = {**RECORDINGS["Wan"], "calls": [longer]}
    patched, handle = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    close(comfyui_calls.forward(patched, recording, SIGMAS[1]), comfyui_calls.forward(Patcher(), recording, SIGMAS[1]))
    assert component(handle).dense_reasons == {Reason.TOKEN_COUNT: 1}


def test_an_unknown_model_is_left_alone_and_named() -> None:
    recording = {**RECORDINGS["Wan"], "class": "StrangeModel"}
    patched, handle = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    close(comfyui_calls.forward(patched, recording, SIGMAS[1]), comfyui_calls.forward(Patcher(), recording, SIGMAS[1]))
    assert "StrangeModel" in handle.report().summary()
    assert "it is for Wan, HunyuanVideo, Flux, Qwen-Image, LTX-Video" in handle.report().summary()


def test_calls_outside_of_a_forward_are_native() -> None:
    patched, handle = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    options = patched.model_options["transformer_options"]
    q = torch.randn(1, 1280, 64)
    assert torch.equal(comfyui_calls.attention(options, q, q, q, 2), comfyui_calls.native(q, q, q, 2))
    assert not handle.report().components


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    recording = {
        **RECORDINGS["Wan"],
        "calls": [{"args": [{"shape": [1, 1280, 128], "dtype": "float32"}], "kwargs": {}, "has_options": True}],
    }
    patched, _ = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    with pytest.raises(TypeError):
        comfyui_calls.forward(patched, recording, SIGMAS[1])
    assert running() is None


def test_the_model_that_went_in_stays_as_it_was() -> None:
    model = Patcher()
    options = model.model_options
    native = comfyui_calls.forward(model, RECORDINGS["Wan"], SIGMAS[1])
    patched, _ = host.attach(model, "rain_fusion_attn", KEYS)
    assert model.model_options is options
    assert options == {"transformer_options": {}}
    assert not model.wrappers
    assert (comfyui_calls.forward(patched, RECORDINGS["Wan"], SIGMAS[1])[0] - native[0]).abs().max() > 1e-2
    assert torch.equal(comfyui_calls.forward(model, RECORDINGS["Wan"], SIGMAS[1])[0], native[0])


def test_clones_count_for_the_same_handle_and_a_second_node_replaces_the_first() -> None:
    patched, first = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    comfyui_calls.forward(patched.clone().clone(), RECORDINGS["Wan"], SIGMAS[1])
    assert component(first).sparse == 2
    first.begin()
    patched, second = host.attach(patched, "block_sparse_attn", KEYS)
    comfyui_calls.forward(patched, RECORDINGS["Wan"], SIGMAS[0])
    assert not first.report().components
    assert component(second).dense == 2


def test_dense_calls_go_to_the_override_of_an_earlier_node() -> None:
    model = Patcher()
    model.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: func(*args, **kwargs) * 0 + 7
    patched, _ = host.attach(model, "rain_fusion_attn", KEYS)
    patched, _ = host.attach(patched, "rain_fusion_attn", KEYS)
    assert (comfyui_calls.forward(patched, RECORDINGS["Wan"], SIGMAS[0])[0] == 7).all()
    sparse = comfyui_calls.forward(patched, RECORDINGS["Wan"], SIGMAS[1])
    assert not (sparse[0] == 7).any()
    # cross-attention
    assert (sparse[1] == 7).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Patcher(), "rain_fusion"), UnknownBackend, "did you mean 'rain_fusion_attn'"),
        ((Patcher(), "torch_sdpa"), ConfigError, "is not sparse.*take permuted_sparse_attn"),
        ((Patcher(), "rain_fusion_attn", {"sparsity": 1.5}), ConfigError, "sparsity"),
        ((Patcher("npu" if hasattr(torch, "npu") else "meta"), "fa"), ConfigError, "is not sparse"),
        ((object(), "rain_fusion_attn"), UnsupportedModel, "update ComfyUI"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_of_the_node(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        host.attach(*arguments)


def test_a_device_that_is_not_there_is_an_error_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditattn.devices.cpu.Cpu.why_unavailable", lambda self: "it is switched off")
    with pytest.raises(BackendUnavailable, match="asked for on cpu: it is switched off"):
        host.attach(Patcher(), "rain_fusion_attn")


@pytest.mark.parametrize(
    ("widgets", "keys"),
    [
        (("balanced", -1.0, "preset"), {"preset": "balanced"}),
        (("fast", 0.6000000000001, "20%"), {"preset": "fast", "sparsity": 0.6, "skip_first_steps": "20%"}),
        (("quality", 0.0, "3"), {"preset": "quality", "sparsity": 0.0, "skip_first_steps": "3"}),
    ],
)
def test_keys_from_widgets(widgets: tuple[str, float, str], keys: dict[str, Any]) -> None:
    assert host.keys_of(*widgets) == keys
    host.attach(Patcher(), "permuted_sparse_attn", host.keys_of(*widgets))


def test_widgets_that_mean_nothing_are_an_error() -> None:
    for widgets in (("balanced", -0.5, "preset"), ("balanced", 0.5, "many")):
        with pytest.raises(ConfigError):
            host.attach(Patcher(), "permuted_sparse_attn", host.keys_of(*widgets))


def test_the_picture_has_a_row_for_a_layer_and_a_column_for_a_step() -> None:
    patched, handle = host.attach(Patcher(), "rain_fusion_attn", KEYS)
    torch.testing.assert_close(host.density_picture(handle, 2), torch.tensor(UNKNOWN_COLOUR).expand(1, 2, 2, 3))
    for sigma in SIGMAS[:3]:
        comfyui_calls.forward(patched, RECORDINGS["Wan"], sigma)
    picture = host.density_picture(handle, 2)
    assert picture.shape == (1, 2 * 2, 4 * 2, 3)
    dense, sparse, unknown = (torch.tensor(colour) for colour in (DENSE_COLOUR, SPARSE_COLOUR, UNKNOWN_COLOUR))
    density = component(handle).sparse_density_by_step[1]
    torch.testing.assert_close(picture[0, 0, 0], dense)
    torch.testing.assert_close(picture[0, 0, 7], unknown)
    row = picture[0, :, 2].mean(0)
    torch.testing.assert_close(row, density * dense + (1 - density) * sparse, rtol=1e-3, atol=1e-3)


def nodes() -> Any:
    """The node pack as ComfyUI loads it: a file somewhere, under a name of ComfyUI's."""
    folder = ROOT / "comfyui"
    spec = importlib.util.spec_from_file_location("custom_node", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_node_pack_works_from_its_folder() -> None:
    pack = nodes()
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    attention, report = pack.NODE_CLASS_MAPPINGS["DitattnAttention"], pack.NODE_CLASS_MAPPINGS["DitattnReport"]
    assert attention.INPUT_TYPES()["required"]["model"] == ("MODEL",)
    patched, handle = getattr(attention(), attention.FUNCTION)(Patcher(), "rain_fusion_attn", "fast", 0.5, "1")
    outputs = re.findall(
        r"^\| .*\| `(\w+)` \| ([A-Z]+) \|", (ROOT / "docs" / "hosts" / "comfyui.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert outputs == [pair for node in (attention, report) for pair in zip(node.RETURN_NAMES, node.RETURN_TYPES, strict=True)]
    assert outputs[2:] == [("report", "STRING"), ("density", "IMAGE")]
    assert handle.setting.keys == {"preset": "fast", "sparsity": 0.5, "skip_first_steps": 1}
    comfyui_calls.sampling(patched, lambda: comfyui_calls.forward(patched, RECORDINGS["Wan"], SIGMAS[1]))
    shown = getattr(report(), report.FUNCTION)(handle, {"samples": None})
    text, picture = shown["result"]
    assert shown["ui"] == {"text": [text]}
    # 1280 tokens are fewer than min_tokens, which the widgets do not have
    assert "rain_fusion_attn: 2 dense (short sequence: 2)" in text
    assert picture.shape[-1] == 3
    assert picture.ndim == 4


def test_the_node_pack_has_what_the_registry_asks_for() -> None:
    settings = tomllib.loads((ROOT / "comfyui" / "pyproject.toml").read_text(encoding="utf-8"))
    assert {"PublisherId", "DisplayName"} <= settings["tool"]["comfy"].keys()
    assert settings["project"]["dependencies"] == ["ditattn"]
    assert (ROOT / "comfyui" / "requirements.txt").read_text(encoding="utf-8").split() == ["ditattn"]
    assert settings["project"]["version"] == sys.modules["ditattn"].__version__
