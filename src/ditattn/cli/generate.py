"""`ditattn generate`: the options, under sglang's names, and nothing else."""

from __future__ import annotations

from typing import Any

from ditattn.cli.options import (
    AttentionBackend,
    AttentionBackendConfig,
    ComponentAttentionBackends,
    Config,
    Debug,
    Device,
    Dtype,
    Fps,
    GuidanceScale,
    Height,
    ImagePath,
    ModelPath,
    NegativePrompt,
    NumFrames,
    NumInferenceSteps,
    OutputFileName,
    OutputPath,
    PerfDumpPath,
    Prompt,
    Revision,
    Seed,
    Strict,
    TrustRemoteCode,
    Width,
)

__all__ = ["generate"]


def generate(
    model_path: ModelPath = None,
    prompt: Prompt = None,
    config: Config = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    negative_prompt: NegativePrompt = None,
    image_path: ImagePath = None,
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    fps: Fps = None,
    num_inference_steps: NumInferenceSteps = None,
    guidance_scale: GuidanceScale = None,
    seed: Seed = None,
    attention_backend: AttentionBackend = None,
    attention_backend_config: AttentionBackendConfig = None,
    component_attention_backends: ComponentAttentionBackends = None,
    strict: Strict = None,
    output_path: OutputPath = None,
    output_file_name: OutputFileName = None,
    perf_dump_path: PerfDumpPath = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Make a video or an image with a diffusers pipeline whose self-attention runs through the backend you name.

    Beside the result a .json file records every setting, version and time, and what the attention really did.
    """
    options: dict[str, Any] = {key: value for key, value in locals().items() if key not in ("config", "debug")}
    from ditattn.cli.session import run_generate
    from ditattn.cli.settings import read_settings

    given = {key: value for key, value in options.items() if value not in (None, [])}
    run_generate(read_settings(given, config), debug=debug)
