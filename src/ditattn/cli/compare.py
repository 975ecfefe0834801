"""`ditattn compare`: the options, and nothing else."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ditattn.cli.options import (
    ATTENTION,
    MACHINE,
    OUTPUT,
    SAMPLING,
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
    OutputPath,
    Prompt,
    Revision,
    Strict,
    TrustRemoteCode,
    Width,
)

__all__ = ["compare"]

Seeds = Annotated[
    list[int] | None,
    typer.Option(min=0, rich_help_panel=SAMPLING, show_default="42", help="Repeat it for several: every prompt is made with every seed."),
]
AttentionBackends = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=ATTENTION,
        show_default=False,
        help="What to compare with torch_sdpa: rain_fusion_attn, block_sparse_attn, fa, laser_attn. Repeat it for several.",
    ),
]
AttentionBackendConfigs = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONFIG",
        rich_help_panel=ATTENTION,
        show_default=False,
        help="Settings: k=v,k=v, JSON text, or a .json or .yaml file. Repeat it for several: every backend runs with each of them.",
    ),
]
GridOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="K=V,V,...",
        rich_help_panel=ATTENTION,
        show_default=False,
        help="Values of a key to compare: sparsity=0.5,0.75,0.9. Repeat it for several keys: all combinations run.",
    ),
]
OutputFileName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", rich_help_panel=OUTPUT, show_default="prompt, time and a hash", help="Of the page (.html) and the numbers (.json)."
    ),
]
Repeats = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=MACHINE, show_default="1", help="Runs per clip and setting; times are medians.")
]
NoProbe = Annotated[
    bool,
    typer.Option("--no-probe", rich_help_panel=MACHINE, help="Do not measure dropped softmax mass, which costs a dense run more."),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-reference-cache", rich_help_panel=MACHINE, help="Make the dense references anew, and keep none."),
]


def compare(
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
    seed: Seeds = None,
    attention_backend: AttentionBackends = None,
    attention_backend_config: AttentionBackendConfigs = None,
    grid: GridOption = None,
    component_attention_backends: ComponentAttentionBackends = None,
    strict: Strict = None,
    output_path: OutputPath = None,
    output_file_name: OutputFileName = None,
    device: Device = None,
    dtype: Dtype = None,
    repeats: Repeats = None,
    no_probe: NoProbe = False,
    no_reference_cache: NoCache = False,
    debug: Debug = False,
) -> None:
    """Measure what settings cost and save, against dense attention with the same prompts and seeds.

    Writes one self-contained HTML page and the same numbers as JSON.
    """
    options: dict[str, Any] = {
        key: value for key, value in locals().items() if key not in ("config", "debug", "no_probe", "no_reference_cache")
    }
    from ditattn.cli.comparing import run_compare
    from ditattn.cli.settings import CompareSettings, read_call_settings

    given = {key: value for key, value in options.items() if value not in (None, [])}
    switched_off = {"probe": no_probe, "reference_cache": no_reference_cache}
    given |= {key: False for key, off in switched_off.items() if off}
    run_compare(read_call_settings(CompareSettings, given, config), debug=debug)
