"""Every error that a user can cause: one line on stderr, a non-zero status, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import forked
from ditattn.errors import ModelNotLoaded

WITHOUT_GPU = not torch.cuda.is_available()


def assert_one_line(done: Any, *words: str, status: int = 2) -> None:
    assert done.status == status, (done.status, done.err)
    assert len(done.error_lines) == 1, done.err
    assert done.err.rstrip().splitlines()[-1] == done.error_lines[0]
    for word in words:
        assert word in done.error_lines[0]
    assert "Traceback" not in done.err
    assert "wrote" not in done.out


# what is added to a command that works, and words that the line must hold
WRONG = {
    "unknown backend": (["--attention-backend", "rain_fusion"], ["no attention backend 'rain_fusion'", "did you mean 'rain_fusion_attn'"]),
    "unknown component backend": (["--component-attention-backends", "transformer=fast"], ["'fast'"]),
    "no such component": (["--component-attention-backends", "text_encoder=fa"], ["no denoiser named text_encoder; there is transformer"]),
    "component backends without names": (["--component-attention-backends", "fa"], ["k=v"]),
    "unknown key": (
        ["--attention-backend", "rain_fusion_attn", "--attention-backend-config", "sparsty=0.5"],
        ["unknown key 'sparsty'", "did you mean 'sparsity'"],
    ),
    "value out of range": (["--attention-backend", "rain_fusion_attn", "--attention-backend-config", "sparsity=2"], ["sparsity"]),
    "key for a dense backend": (
        ["--attention-backend", "torch_sdpa", "--attention-backend-config", "sparsity=0.5"],
        ["no configuration keys"],
    ),
    "broken JSON": (["--attention-backend", "rain_fusion_attn", "--attention-backend-config", "{"], ["not valid JSON"]),
    "no such layer": (
        ["--attention-backend", "rain_fusion_attn", "--attention-backend-config", "skip_layers=7"],
        ["skip_layers names 7", "0-0"],
    ),
    "unknown step cache": (["--cache", "tea"], ["no step cache 'tea'", "first_block"]),
    "unknown key of a step cache": (["--cache", "first_block", "--cache-config", "treshold=1"], ["'treshold'", "did you mean 'threshold'"]),
    "keys of no step cache": (["--cache-config", "threshold=1"], ["--cache-config is for a step cache: name it with --cache"]),
    "step cache without its ratios": (["--cache", "mag"], ["the step cache mag needs mag_ratios", "calibrate=true prints them"]),
    "value of a step cache": (
        ["--cache", "first_block", "--cache-config", "threshold=abc"],
        ["the step cache first_block: threshold: Input should be a valid number", "(got 'abc')"],
    ),
    "step cache for more blocks": (["--cache", "first_block"], ["first_block needs two or more transformer blocks"]),
    "step cache that finds no layer": (["--cache", "taylorseer"], ["taylorseer found no layer", "cache_identifiers"]),
    "height": (["--height", "60"], ["height must be a multiple of 16, not 60", "48 or 64"]),
    "tiny width": (["--width", "5"], ["width must be a multiple of 16, not 5", "nearest: 16"]),
    "zero frames": (["--num-frames", "0"], ["--num-frames"]),
    "not a number": (["--num-frames", "many"], ["--num-frames"]),
    "unknown option": (["--num-frame", "5"], ["--num-frame"]),
    "an image for a text-to-video model": (["--image-path", "IMAGE"], ["--image-path cannot be honoured", "WanPipeline takes no 'image'"]),
    "missing image": (["--image-path", "nowhere.png"], ["no such file: nowhere.png"]),
    "image that is none": (["--image-path", __file__], ["not an image"]),
    "dtype": (["--dtype", "float17"], ["float17", "bfloat16"]),
    "device": (["--device", "toaster"], ["toaster", "cpu, cuda, npu"]),
    "device number": (["--device", "cpu:3"], ["cpu:0"]),
    "missing config file": (["--config", "nowhere.yaml"], ["nowhere.yaml does not exist"]),
    "file name with a folder": (["--output-file-name", "a/b"], ["--output-path"]),
    "file name of an image": (["--output-file-name", "a.png"], ["the result is a .mp4 file"]),
    "file name of a video of another kind": (["--output-file-name", "a.GIF"], ["ends in .gif, but the result is a .mp4 file"]),
    "file name that is empty": (["--output-file-name", ""], ["--output-file-name", "empty"]),
    "file name too long": (["--output-file-name", "圆" * 90], ["--output-file-name", "270 bytes", "200"]),
    "guidance that is no number": (["--guidance-scale", "nan"], ["guidance_scale", "finite"]),
    "endless guidance": (["--guidance-scale", "inf"], ["guidance_scale", "finite"]),
    "empty prompt": (["--prompt", " "], ["a prompt is needed"]),
    "rate that no video has": (["--fps", "999999999999"], ["--fps", "less than or equal to 1000"]),
    "height beyond all memory": (["--height", "16000000000000000000000"], ["--height", "less than or equal to 1000000"]),
    "steps beyond all schedules": (["--num-inference-steps", "99999999999999999999"], ["--num-inference-steps", "1000000"]),
    "revision of a folder": (["--revision", "main"], ["--revision is for a --model-path on the hub", "is a folder"]),
    "a folder that nobody can make": (["--output-path", "/proc/nowhere"], ["--output-path: cannot write to /proc"]),
    "two seeds": (["--seed", "1", "--seed", "2"], ["--seed was given 2 times: 1, 2. This command takes one value"]),
    "settings in two parts": (
        ["--attention-backend", "fa", "--attention-backend-config", "a=1", "--attention-backend-config", "b=2"],
        ["--attention-backend-config was given 2 times: a=1, b=2"],
    ),
    "null character in a name": (["--output-file-name", "a\0b"], ["--output-file-name", "plain name"]),
    "null character in a path": (["--output-path", "a\0b"], ["no null character"]),
    "revision of a missing path": (["--model-path", "./nowhere", "--revision", "v1"], ["no such folder: ./nowhere"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(ditattn, small, tmp_path, case):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    added, words = WRONG[case]
    added = [str(tmp_path / "image.png") if part == "IMAGE" else part for part in added]
    assert_one_line(ditattn(*small, *added), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("environment", "added", "words"),
    [
        ("", ["--attention-backend-config", "sparsity=0.5"], ["unknown key 'sparsity'", "torch_sdpa", "--attention-backend"]),
        ("rain_fusion_attn", ["--attention-backend-config", "sparsty=0.5"], ["did you mean 'sparsity'"]),
        ("rain_fusion", [], ["no attention backend 'rain_fusion'", "DITATTN_ATTENTION_BACKEND"]),
    ],
)
def test_what_is_wrong_without_a_named_backend_is_known_before_loading(ditattn, small, tmp_path, monkeypatch, environment, added, words):
    monkeypatch.setenv("DITATTN_ATTENTION_BACKEND", environment)
    monkeypatch.setattr("ditattn.cli.generate.load", lambda *_: pytest.fail("the model was loaded"))
    assert_one_line(ditattn(*small, *added), *words)


@pytest.mark.parametrize("path", ["nowhere", "./nowhere", "/nowhere/at/all", "~/nowhere/model", "models/wan/21", "nowhere/"])
def test_a_missing_path_never_reaches_the_network(ditattn, tmp_path, monkeypatch, path):
    import diffusers

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda *a, **k: pytest.fail("the hub was asked"))
    done = ditattn("generate", "--model-path", path, "--prompt", "a", "--output-path", tmp_path / "out")
    assert_one_line(done, f"no such folder: {path}")


def test_a_path_below_an_existing_folder_is_no_hub_id(monkeypatch, tmp_path):
    from ditattn.hosts.diffusers.load import read_index

    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(ModelNotLoaded, match="no such folder: outputs/model"):
        read_index("outputs/model")


def test_an_unreachable_hub_is_one_line(ditattn, tmp_path, monkeypatch):
    import diffusers

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", offline)
    done = ditattn("generate", "--model-path", "owner/name", "--prompt", "a", "--output-path", tmp_path / "out")
    assert_one_line(done, "cannot load owner/name: We couldn't connect")


def test_a_folder_without_a_pipeline(ditattn, tmp_path):
    done = ditattn("generate", "--model-path", tmp_path, "--prompt", "a", "--output-path", tmp_path / "out")
    assert_one_line(done, "model_index.json")


def test_an_unknown_pipeline_class_needs_permission_for_its_code(ditattn, wan_folder, tmp_path):
    index = json.loads((wan_folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "_class_name": "SomebodysPipeline"}))
    done = ditattn("generate", "--model-path", tmp_path, "--prompt", "a", "--output-path", tmp_path / "out")
    assert_one_line(done, "SomebodysPipeline", "--trust-remote-code")


def test_pickled_weights_are_refused(ditattn, small, wan_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(wan_folder, folder)
    from safetensors.torch import load_file

    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert_one_line(ditattn(*small, "--model-path", folder), "safetensors", "never pickles")


def test_an_unknown_key_in_the_file(ditattn, small, tmp_path):
    (tmp_path / "run.yaml").write_text("num_frame: 5\n")
    assert_one_line(ditattn(*small, "--config", tmp_path / "run.yaml"), "unknown key 'num_frame'", "did you mean 'num_frames'")


def test_a_wrong_value_in_the_file(ditattn, small, tmp_path):
    (tmp_path / "run.yaml").write_text("guidance_scale: strong\n")
    assert_one_line(ditattn(*small, "--config", tmp_path / "run.yaml"), "guidance_scale", "'strong'")


def test_a_frame_count_that_the_pipeline_would_round(ditattn, wan_temporal_folder, tmp_path):
    arguments = ["generate", "--model-path", wan_temporal_folder, "--prompt", "a", "--output-path", tmp_path / "out"]
    done = ditattn(*arguments, "--num-frames", 18, "--height", 32, "--width", 32)
    assert_one_line(done, "num_frames must be a multiple of 4 plus 1, not 18", "17 or 21")


@pytest.mark.skipif(not WITHOUT_GPU, reason="this machine has a GPU")
def test_devices_that_are_not_here(ditattn, small):
    assert_one_line(ditattn(*small, "--device", "cuda"), "--device cuda", "CUDA", status=1)


def test_an_npu_that_is_not_here_says_what_to_install(ditattn, small):
    pytest.importorskip("diffusers")
    assert_one_line(ditattn(*small, "--device", "npu"), "torch_npu", "pip install torch-npu", status=1)


def test_strict_refuses_what_would_run_densely(ditattn, small, monkeypatch):
    from ditattn.runtime.served_model import ServedModel

    monkeypatch.setattr(ServedModel, "layout_of", lambda *a: None)
    config = "skip_first_steps=0,min_tokens=0"
    done = ditattn(*small, "--attention-backend", "rain_fusion_attn", "--attention-backend-config", config, "--strict")
    assert_one_line(done, "would run densely", "unknown geometry", status=1)


def test_an_output_path_that_is_a_file(ditattn, small, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(ditattn(*small, "--output-path", tmp_path / "file"), "is not a folder")
    assert_one_line(ditattn(*small, "--perf-dump-path", tmp_path / "file" / "p.json"), "--perf-dump-path")


@pytest.mark.parametrize(
    ("dump", "words"),
    [
        ("out/x.json", "the record of the run"),
        ("out/../out/x.json", "the record of the run"),
        ("out/x.mp4", "the result"),
        (".", "a folder"),
    ],
)
def test_a_performance_dump_in_the_place_of_another_file(ditattn, small, tmp_path, dump, words):
    done = ditattn(*small, "--output-file-name", "x", "--perf-dump-path", tmp_path / dump)
    assert_one_line(done, "--perf-dump-path", words)
    assert not (tmp_path / "out").exists()


def test_no_prompt(ditattn, wan_folder):
    assert_one_line(ditattn("generate", "--model-path", wan_folder), "a prompt is needed: --prompt TEXT")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory(ditattn, small, monkeypatch, error):
    from ditattn.hosts.diffusers import call

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(call, "call_pipeline", fail)
    assert_one_line(ditattn(*small), "out of memory", "--num-frames", status=1)


def test_a_bug_is_one_line_too_and_debug_shows_where(ditattn, small, monkeypatch):
    from ditattn.hosts.diffusers import call

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("something\ninternal")

    monkeypatch.setattr(call, "call_pipeline", fail)
    assert_one_line(ditattn(*small), "KeyError", "--debug", status=1)
    done = ditattn(*small, "--debug")
    assert done.status == 1
    assert "Traceback" in done.err
    assert "in fail" in done.err


def test_pixels_that_are_no_numbers(ditattn, small, monkeypatch, tmp_path):
    from diffusers import AutoencoderKLWan

    decode = AutoencoderKLWan.decode
    monkeypatch.setattr(AutoencoderKLWan, "decode", lambda self, z, **k: (decode(self, z, **k)[0] * torch.nan,))
    assert_one_line(ditattn(*small), "not numbers", "--dtype float32")
    assert not (tmp_path / "out").exists()


def test_a_size_that_the_pipeline_changed_is_said(ditattn, small, monkeypatch, tmp_path):
    from ditattn.hosts.diffusers import call

    monkeypatch.setattr(call, "check_geometry", lambda *a: None)
    monkeypatch.setattr(call, "frames_to_ask", lambda pipe, count: count)
    done = ditattn(*small, "--num-frames", 1)
    assert done.status == 0
    assert "warning: num_frames 1 was asked for, the pipeline made 2" in done.err
    assert json.loads(next((tmp_path / "out").glob("*.json")).read_text())["output"]["num_frames"] == 2


@pytest.mark.parametrize("broken", ["media", "sidecar", "interrupt"])
def test_a_failed_write_leaves_nothing(ditattn, small, monkeypatch, tmp_path, broken):
    from ditattn.cli import generate

    def half(path: Path, *args: Any) -> None:
        path.write_bytes(b"half a video")
        raise KeyboardInterrupt if broken == "interrupt" else OSError(28, "No space left on device")

    def no_json(content: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate, "_json" if broken == "sidecar" else "write_media", no_json if broken == "sidecar" else half)
    done = ditattn(*small, "--num-frames", 1, "--output-path", tmp_path / "deep" / "out")
    assert_one_line(done, *(["interrupted"] if broken == "interrupt" else ["No space left"]), status=130 if broken == "interrupt" else 1)
    assert not (tmp_path / "deep").exists()


def test_earlier_results_survive_a_failed_write(ditattn, small, monkeypatch, tmp_path):
    from ditattn.cli import generate

    arguments = [*small, "--num-frames", 1, "--output-file-name", "x"]
    assert ditattn(*arguments).status == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def full(path: Path, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generate, "write_media", full)
    assert ditattn(*arguments).status == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_while_denoising(small, tmp_path, number, status):
    # steps are shown on a terminal alone
    ours, theirs = pty.openpty()
    arguments = [*map(str, small), "--num-inference-steps", "2000"]
    with open(tmp_path / "stdout", "wb") as stdout:
        child = forked.start("ditattn.cli", arguments, {"TERM": "xterm", "COLUMNS": "120"}, stdout.fileno(), theirs)
    os.close(theirs)
    said = Said(ours)
    while not re.search(r"step [1-9]\d* of 2000", said.text) and said.more():
        pass
    os.kill(child.pid, number)
    while said.more():
        pass
    child.join()
    os.close(ours)
    assert re.search(r"step [1-9]\d* of 2000", said.text)
    assert "step 2000 of 2000" not in said.text
    assert child.exitcode == status, said.text
    assert "Traceback" not in said.text
    assert (tmp_path / "stdout").read_bytes() == b""
    assert not (tmp_path / "out").exists()
    if number == signal.SIGINT:
        assert [line for line in said.text.splitlines() if line.startswith("ditattn:")] == [
            "ditattn: interrupted; nothing half-written is left"
        ]


class Said:
    """What the other end of a terminal has written so far, without colours and moves of the cursor."""

    def __init__(self, end: int) -> None:
        self._end, self._bytes = end, b""

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", self._bytes.decode(errors="replace"))

    def more(self) -> bool:
        """Waits for more; False: nobody is there any longer."""
        try:
            new = os.read(self._end, 65536)
        except OSError:
            # Linux says so with EIO
            new = b""
        self._bytes += new
        return bool(new)
