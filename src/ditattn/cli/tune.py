"""`ditattn tune`: the options, and nothing else."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ditattn.cli.compare import Seeds
from ditattn.cli.options import (
    ATTENTION,
    OUTPUT,
    SAMPLING,
    ComponentAttentionBackends,
    Config,
    Debug,
    Device,
    Dtype,
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

__all__ = ["tune"]

TARGET = "Target"

TargetPsnr = Annotated[
    float | None,
    typer.Option(min=1, rich_help_panel=TARGET, show_default=False, help="Decibels that the worst clip must reach against dense."),
]
TargetSsim = Annotated[
    float | None, typer.Option(min=0, max=1, rich_help_panel=TARGET, show_default=False, help="SSIM that the worst clip must reach, too.")
]
BudgetRuns = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=TARGET, show_default="12", help="Settings to try at most, each on all clips.")
]
CheckPrompt = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=SAMPLING, show_default="the prompts, with other seeds", help="What the result is checked on. Repeat it for several."
    ),
]
AttentionBackend = Annotated[
    str | None, typer.Option(metavar="NAME", rich_help_panel=ATTENTION, show_default="rain_fusion_attn", help="A sparse backend.")
]
FixedConfig = Annotated[
    str | None,
    typer.Option(
        metavar="CONFIG",
        rich_help_panel=ATTENTION,
        show_default=False,
        help="Keys to hold fixed: min_tokens, token_order, first_frame_sink, ... The search sets sparsity and the skip_ keys.",
    ),
]
OutputFileName = Annotated[
    str | None, typer.Option(metavar="NAME", rich_help_panel=OUTPUT, show_default="tune_ and a hash", help="Of the .yaml file.")
]


def tune(
    target_psnr: TargetPsnr = None,
    target_ssim: TargetSsim = None,
    budget_runs: BudgetRuns = None,
    model_path: ModelPath = None,
    prompt: Prompt = None,
    check_prompt: CheckPrompt = None,
    config: Config = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = None,
    negative_prompt: NegativePrompt = None,
    image_path: ImagePath = None,
    height: Height = None,
    width: Width = None,
    num_frames: NumFrames = None,
    num_inference_steps: NumInferenceSteps = None,
    guidance_scale: GuidanceScale = None,
    seed: Seeds = None,
    attention_backend: AttentionBackend = None,
    attention_backend_config: FixedConfig = None,
    component_attention_backends: ComponentAttentionBackends = None,
    strict: Strict = None,
    output_path: OutputPath = None,
    output_file_name: OutputFileName = None,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Find the fastest setting whose worst clip still meets a quality target, and check it on clips it was not tuned on.

    Writes a YAML file for --attention-backend-config. Interrupted, it keeps what it found; the same command goes on from there.
    Exit status 3: nothing meets the target faster than dense.
    """
    options: dict[str, Any] = {key: value for key, value in locals().items() if key not in ("config", "debug")}
    from ditattn.cli.settings import TuneSettings, read_call_settings
    from ditattn.cli.tuning import run_tune

    given = {key: value for key, value in options.items() if value not in (None, [])}
    run_tune(read_call_settings(TuneSettings, given, config), debug=debug)
