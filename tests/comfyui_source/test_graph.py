"""A whole graph by ComfyUI's own executor: loader, ditattn attention, KSampler, ditattn report."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from comfyui_source import tiny_models
from ditattn.hosts.comfyui.picture import DENSE_COLOUR

execution = pytest.importorskip("execution", reason="ComfyUI's executor needs more packages than its models do")
comfy_nodes = pytest.importorskip("nodes", reason="ComfyUI's nodes need more packages than its models do")
ROOT = Path(__file__).resolve().parents[2]
SEEN: list[tuple[str, torch.Tensor]] = []


class TinyModel:
    RETURN_TYPES, FUNCTION = ("MODEL", "CONDITIONING", "LATENT"), "make"

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {}}

    def make(self) -> Any:
        text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(2))
        return tiny_models.patcher("Wan"), [[text, {"pooled_output": torch.zeros(1, 16)}]], {"samples": torch.zeros(1, 16, 9, 64, 64)}


class Watch:
    RETURN_TYPES, FUNCTION, OUTPUT_NODE = (), "watch", True

    @classmethod
    def INPUT_TYPES(cls) -> Any:
        return {"required": {"text": ("STRING", {"forceInput": True}), "image": ("IMAGE",)}}

    def watch(self, text: str, image: torch.Tensor) -> Any:
        SEEN.append((text, image))
        return ()


class Server:
    client_id, last_node_id, last_prompt_id = None, None, None

    def send_sync(self, *args: Any) -> None:
        pass


def graph(seed: int, backend: str = "rain_fusion_attn") -> dict[str, Any]:
    sampling = {"seed": seed, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    texts = {"positive": ["1", 1], "negative": ["1", 1], "latent_image": ["1", 2]}
    chosen = {"backend": backend, "preset": "fast", "sparsity": -1.0, "dense_steps": "1"}
    return {
        "1": {"class_type": "TinyModel", "inputs": {}},
        "2": {"class_type": "DitattnAttention", "inputs": {"model": ["1", 0], **chosen}},
        "3": {"class_type": "KSampler", "inputs": {"model": ["2", 0], **texts, **sampling}},
        "4": {"class_type": "DitattnReport", "inputs": {"ditattn": ["2", 1], "latent": ["3", 0]}},
        "5": {"class_type": "Watch", "inputs": {"text": ["4", 0], "image": ["4", 1]}},
    }


def run(executor: Any, prompt: dict[str, Any]) -> None:
    valid, error, outputs, details = asyncio.run(execution.validate_prompt("id", prompt, None))
    assert valid, (error, details)
    executor.execute(prompt, "id", {}, outputs)
    assert executor.success, executor.status_messages


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_graph_samples_and_reports(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / ("ditattn" if form == "folder" else "ditattn.py")
    if form == "folder":
        shutil.copytree(ROOT / "comfyui", place)
    else:
        shutil.copy(ROOT / "comfyui" / "__init__.py", place)
    assert asyncio.run(comfy_nodes.load_custom_node(str(place)))
    monkeypatch.setitem(comfy_nodes.NODE_CLASS_MAPPINGS, "TinyModel", TinyModel)
    monkeypatch.setitem(comfy_nodes.NODE_CLASS_MAPPINGS, "Watch", Watch)
    executor = execution.PromptExecutor(Server())
    SEEN.clear()
    run(executor, graph(seed=1))
    text, image = SEEN[-1]
    # 9 x 32 x 32 tokens, two layers, one dense step of four
    assert "rain_fusion_attn: 6 sparse at density 0." in text
    assert "2 dense (first steps: 2)" in text
    assert image.shape == (1, 2 * 12, 4 * 12, 3)
    assert image[0, 0, 0].tolist() == pytest.approx(DENSE_COLOUR)
    assert image[0, 0, -1, 0] > 0.5
    run(executor, graph(seed=1))
    assert len(SEEN) == 1
    run(executor, graph(seed=2))
    assert len(SEEN) == 2
    assert "6 sparse" in SEEN[-1][0]
    run(executor, graph(seed=2, backend="permuted_sparse_attn"))
    assert "permuted_sparse_attn: 6 sparse" in SEEN[-1][0]
