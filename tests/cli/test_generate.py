"""`ditattn generate` as a user types it: files, side-car, perf dump, precedence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from ditattn.cli import record as run_record
from ditattn.cli.device import choose_dtype
from ditattn.cli.record import KERNEL_PACKAGES
from ditattn.devices.cpu import multiplies_bfloat16

SPARSE = ["--attention-backend", "rain_fusion_attn", "--attention-backend-config", "sparsity=0.5,skip_first_steps=50%,min_tokens=0"]


def decode(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    reader = imageio_ffmpeg.read_frames(str(path))
    facts = next(reader)
    width, height = facts["size"]
    return facts, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1, found
    return found[0]


def record(folder: Path) -> dict[str, Any]:
    return json.loads(only(folder, "*.json").read_text())


def test_video_sidecar_perf_dump_and_summary_tell_the_same(ditattn, small, tmp_path):
    done = ditattn(*small, *SPARSE, "--seed", 7, "--fps", 5, "--guidance-scale", 3, "--perf-dump-path", tmp_path / "perf" / "p.json")
    assert done.status == 0, done.err
    facts, frames = decode(only(tmp_path / "out", "*.mp4"))
    assert frames.shape == (5, 64, 64, 3)
    assert (facts["codec"], facts["pix_fmt"].split("(")[0], facts["fps"]) == ("h264", "yuv420p", 5)
    assert frames.std() > 5

    sidecar = record(tmp_path / "out")
    component = sidecar["attention"]["components"]["transformer"]
    # 4 steps x 2 branches x 1 layer; half of the steps dense
    assert (component["calls"], component["sparse"], component["dense_reasons"]) == (8, 4, {"first steps": 4})
    assert 0.5 <= component["sparse_density"] < 1
    assert sidecar["settings"]["given"]["attention_backend_config"] == {"sparsity": 0.5, "skip_first_steps": "50%", "min_tokens": 0}
    effective = sidecar["settings"]["effective"]
    assert (effective["height"], effective["num_frames"], effective["fps"], effective["seed"]) == (64, 5, 5, 7)
    assert effective["attention_backend_config"]["transformer"]["token_order"] == "tile"
    assert sidecar["output"]["file"] == str(only(tmp_path / "out", "*.mp4"))
    assert (sidecar["seed"], sidecar["device"]["type"], sidecar["dtype"]) == (7, "cpu", "bfloat16" if multiplies_bfloat16() else "float32")
    assert {"ditattn", "torch", "diffusers", "transformers", "python"} == set(sidecar["versions"]) - set(KERNEL_PACKAGES)
    assert {"load", "encode", "denoise", "decode", "write"} == set(sidecar["times_ms"])

    perf = json.loads((tmp_path / "perf" / "p.json").read_text())
    assert perf["attention"] == sidecar["attention"]
    assert [step["step"] for step in perf["denoise_steps_ms"]] == [0, 1, 2, 3]
    names = {stage["name"]: stage["duration_ms"] for stage in perf["steps"]}
    assert names["DenoisingStage"] == pytest.approx(sum(step["duration_ms"] for step in perf["denoise_steps_ms"]))
    assert perf["total_duration_ms"] == pytest.approx(sum(names.values()))
    assert {"timestamp", "request_id", "tag", "memory_checkpoints", "meta"} < set(perf)
    assert "commit_hash" not in perf, "an installed package does not know it"
    assert perf["meta"]["prompt"] == "a red circle"

    assert "4 sparse at density" in done.out
    assert "first steps: 4" in done.out
    assert "attention" in done.out.splitlines()[-2]
    assert done.out.splitlines()[-1].startswith("wrote ")
    for stage in ("load WanPipeline", "denoise", "write"):
        assert stage in done.err
    assert "Traceback" not in done.err


def test_same_seed_same_pixels_and_another_seed_others(ditattn, small, tmp_path):
    def pixels(name: str, seed: int) -> bytes:
        done = ditattn(*small, *SPARSE, "--num-frames", 1, "--seed", seed, "--output-file-name", name)
        assert done.status == 0, done.err
        return np.asarray(Image.open(tmp_path / "out" / f"{name}.png")).tobytes()

    first = pixels("a", 3)
    assert pixels("b", 3) == first
    assert pixels("c", 4) != first


def test_command_line_wins_over_the_file(ditattn, small, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "num_inference_steps: 3\nseed: 11\nnum_frames: 1\nprompt: [a big square]\n"
        "attention_backend: block_sparse_attn\nattention_backend_config: {sparsity: 0.25, skip_first_steps: 1, min_tokens: 0}\n"
    )
    done = ditattn(*small, "--config", config, "--seed", 12, "--num-inference-steps", 2)
    assert done.status == 0, done.err
    sidecar = record(tmp_path / "out")
    assert (sidecar["seed"], sidecar["prompt"]) == (12, "a red circle")
    assert sidecar["settings"]["effective"]["num_inference_steps"] == 2
    component = sidecar["attention"]["components"]["transformer"]
    assert (component["backend"], component["config"]["sparsity"]) == ("block_sparse_attn", 0.25)
    # num_frames is on the command line too
    assert sidecar["output"]["num_frames"] == 5


def test_everything_from_the_file(ditattn, wan_folder, tmp_path):
    settings = {"model_path": str(wan_folder), "prompt": "a", "height": 32, "width": 48, "num_frames": 2, "num_inference_steps": 1}
    config = tmp_path / "run.json"
    config.write_text(json.dumps({**settings, "output_path": str(tmp_path / "out"), "component_attention_backends": "transformer=fa"}))
    done = ditattn("generate", "--config", config)
    assert done.status == 0, done.err
    _, frames = decode(only(tmp_path / "out", "*.mp4"))
    # 48 is a multiple of 16, so nothing may rescale it
    assert frames.shape == (2, 32, 48, 3)
    assert record(tmp_path / "out")["settings"]["effective"]["attention_backend"] == {"transformer": "fa"}


def test_several_prompts_load_once_and_report_separately(ditattn, small, tmp_path):
    dump = tmp_path / "perf.json"
    done = ditattn(*small, "--prompt", "a blue square", "--num-frames", 1, "--output-file-name", "x.png", "--perf-dump-path", dump, *SPARSE)
    assert done.status == 0, done.err
    assert done.err.count("load WanPipeline") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x-1.json", "x-1.png", "x-2.json", "x-2.png"]
    records = [json.loads((tmp_path / "out" / f"x-{number}.json").read_text()) for number in (1, 2)]
    assert [item["prompt"] for item in records] == ["a red circle", "a blue square"]
    assert records[0]["attention"]["components"]["transformer"]["calls"] == records[1]["attention"]["components"]["transformer"]["calls"]
    assert (tmp_path / "perf-2.json").is_file()


def test_two_transformers_with_their_own_backends(ditattn, wan22_folder, tmp_path):
    done = ditattn(
        *("generate", "--model-path", wan22_folder, "--prompt", "a", "--output-path", tmp_path / "out", "--height", 64, "--width", 64),
        *("--num-frames", 9, "--num-inference-steps", 4, "--attention-backend", "rain_fusion_attn"),
        *("--attention-backend-config", "skip_first_steps=0,min_tokens=0,sparsity=0.5"),
        *("--component-attention-backends", "transformer_2=torch_sdpa"),
    )
    assert done.status == 0, done.err
    components = record(tmp_path / "out")["attention"]["components"]
    assert {name: part["backend"] for name, part in components.items()} == {
        "transformer": "rain_fusion_attn",
        "transformer_2": "torch_sdpa",
    }
    assert components["transformer"]["sparse"] == components["transformer"]["calls"] > 0
    assert components["transformer_2"]["sparse"] == 0 < components["transformer_2"]["dense"]
    assert record(tmp_path / "out")["output"]["fps"] == 16


def test_image_to_video(ditattn, wan_i2v_folder, tmp_path):
    Image.new("RGB", (80, 60), (200, 30, 30)).save(tmp_path / "start.jpg")
    arguments = [
        "generate",
        "--model-path",
        wan_i2v_folder,
        "--prompt",
        "a",
        "--output-path",
        tmp_path / "out",
        "--height",
        32,
        "--width",
        32,
    ]
    arguments += ["--num-frames", 5, "--num-inference-steps", 2]
    missing = ditattn(*arguments)
    assert (missing.status, len(missing.error_lines)) == (2, 1)
    assert "--image-path" in missing.err
    done = ditattn(*arguments, "--image-path", tmp_path / "start.jpg")
    assert done.status == 0, done.err
    assert decode(only(tmp_path / "out", "*.mp4"))[1].shape == (5, 32, 32, 3)


def test_an_image_pipeline_writes_a_png(ditattn, flux_folder, tmp_path):
    arguments = ["generate", "--model-path", flux_folder, "--prompt", "a red circle", "--output-path", tmp_path / "out"]
    arguments += ["--height", 64, "--width", 96, "--num-inference-steps", 2, *SPARSE]
    done = ditattn(*arguments)
    assert done.status == 0, done.err
    assert Image.open(only(tmp_path / "out", "*.png")).size == (96, 64)
    assert record(tmp_path / "out")["attention"]["components"]["transformer"]["sparse"] > 0
    refused = ditattn(*arguments, "--num-frames", 5)
    assert refused.status == 2
    assert "--num-frames cannot be honoured: FluxPipeline takes no 'num_frames'" in refused.err
    assert "--fps cannot be honoured" in ditattn(*arguments, "--fps", 5).err


def test_without_a_model_the_demo_model_runs_and_says_what_it_is(ditattn, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = ditattn(
        *("generate", "--prompt", "a red circle", "--num-frames", 2, "--num-inference-steps", 1, "--guidance-scale", 1),
        *("--output-path", tmp_path / "out"),
    )
    assert done.status == 0, done.err
    sidecar = record(tmp_path / "out")
    assert sidecar["model"]["demo"]
    assert ("weights are random" in done.err) == sidecar["model"]["random_weights"]
    _, frames = decode(only(tmp_path / "out", "*.mp4"))
    assert frames.shape == (2, 64, 64, 3)
    assert "num_frames - 1" not in done.err


def test_versions_hold_the_packages_with_kernels_that_are_here(monkeypatch):
    def version(package: str) -> str:
        if package == "mindiesd":
            raise run_record.PackageNotFoundError
        return "1.0" if package == "torch_npu" else "2.0"

    monkeypatch.setattr(run_record, "version", version)
    assert run_record.versions()["torch_npu"] == "1.0"
    assert "mindiesd" not in run_record.versions()


@pytest.mark.parametrize(
    ("flags", "capability", "dtype"),
    [
        ("fma avx2", "AVX2", torch.float32),
        ("avx2 avx512f", "AVX512", torch.float32),
        ("avx512f avx512_bf16", "AVX512", torch.bfloat16),
        ("avx512f amx_bf16", "AVX512", torch.bfloat16),
        # torch is kept from what the CPU has
        ("avx512f amx_bf16", "AVX2", torch.float32),
    ],
)
def test_the_dtype_of_a_cpu_is_what_it_multiplies(monkeypatch, flags, capability, dtype):
    monkeypatch.setattr("ditattn.devices.cpu.cpuinfo", lambda: {"flags": flags})
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert choose_dtype(None, torch.device("cpu")) is dtype
    assert choose_dtype("float32", torch.device("cpu")) is torch.float32


def test_a_dtype_that_this_cpu_multiplies_slowly_is_warned_of_once(ditattn, small, monkeypatch):
    rates = {"torch.float32": 113.0, "torch.bfloat16": 1.2}
    monkeypatch.setattr("ditattn.devices.cpu._product_rate", lambda dtype: rates[str(dtype)])
    done = ditattn(*small, "--dtype", "bfloat16", "--prompt", "a blue circle")
    assert done.status == 0, done.err
    assert done.err.count("--dtype bfloat16: torch multiplies bfloat16 matrices 94 times slower than float32") == 1
    rates["torch.bfloat16"] = 113.0
    assert "times slower" not in ditattn(*small, "--dtype", "bfloat16").err


def test_a_step_cache_beside_a_sparse_backend(ditattn, small, tmp_path):
    keys = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": [0, 1001]}
    done = ditattn(*small, *SPARSE, "--cache", "pyramid_attention_broadcast", "--cache-config", json.dumps(keys))
    assert done.status == 0, done.err
    sidecar = record(tmp_path / "out")
    component = sidecar["attention"]["components"]["transformer"]
    # of 4 steps x 2 branches x 1 layer every second call is left out; the clock goes on
    assert (component["calls"], component["sparse"], component["dense_reasons"]) == (4, 2, {"first steps": 2})
    assert (sidecar["settings"]["effective"]["cache"], sidecar["settings"]["effective"]["cache_config"]) == (
        "pyramid_attention_broadcast",
        keys,
    )
