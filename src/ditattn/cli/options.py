"""Options that several verbs share, under sglang's names."""

from __future__ import annotations

from typing import Annotated

import typer

MODEL, SAMPLING, ATTENTION, OUTPUT, MACHINE = "Model", "Sampling", "Attention", "Output", "Machine"

ModelPath = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MODEL,
        show_default=False,
        help="A folder that diffusers' save_pretrained wrote, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers. "
        "Only safetensors weights are loaded. Without it: the small demo model of the package.",
    ),
]
Revision = Annotated[str | None, typer.Option(rich_help_panel=MODEL, show_default=False, help="Branch, tag or commit of a hub repository.")]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", rich_help_panel=MODEL, show_default=False, help="Run Python code that comes with the model."),
]
Config = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        rich_help_panel=MODEL,
        show_default=False,
        help="JSON or YAML file with any of these options, in snake_case (num_frames: 81). The command line wins over the file.",
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        rich_help_panel=SAMPLING, show_default=False, help="What to make. Repeat it for several results; the model is loaded once."
    ),
]
NegativePrompt = Annotated[str | None, typer.Option(rich_help_panel=SAMPLING, show_default=False, help="What to avoid.")]
ImagePath = Annotated[
    str | None, typer.Option(metavar="FILE", rich_help_panel=SAMPLING, show_default=False, help="First frame, for image-to-video models.")
]
Height = Annotated[int | None, typer.Option(min=1, rich_help_panel=SAMPLING, show_default="the model's", help="Pixels.")]
Width = Annotated[int | None, typer.Option(min=1, rich_help_panel=SAMPLING, show_default="the model's", help="Pixels.")]
NumFrames = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=SAMPLING, show_default="the model's", help="Frames of a video; 1 makes an image.")
]
Fps = Annotated[int | None, typer.Option(min=1, rich_help_panel=SAMPLING, show_default="the model's", help="Frames per second of a video.")]
NumInferenceSteps = Annotated[
    int | None, typer.Option(min=1, rich_help_panel=SAMPLING, show_default="the model's", help="Denoising steps.")
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(rich_help_panel=SAMPLING, show_default="the model's", help="Strength of the prompt (classifier-free guidance)."),
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, rich_help_panel=SAMPLING, show_default="42", help="Of the noise, drawn on the CPU: the same on every device."),
]
AttentionBackend = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=ATTENTION,
        show_default="DITATTN_ATTENTION_BACKEND, else the device's best dense one",
        help="Serves the self-attention of the denoiser: torch_sdpa, fa, laser_attn (dense), block_sparse_attn, rain_fusion_attn (sparse).",
    ),
]
AttentionBackendConfig = Annotated[
    str | None,
    typer.Option(
        metavar="CONFIG",
        rich_help_panel=ATTENTION,
        show_default=False,
        help="Settings of the backend: k=v,k=v (sparsity=0.5), JSON text, or a .json or .yaml file. "
        "Keys of the sparse ones: sparsity, skip_first_steps, skip_last_steps, skip_layers, min_tokens, token_order, first_frame_sink, "
        "plan_refresh_steps, share_plan_between_branches.",
    ),
]
ComponentAttentionBackends = Annotated[
    str | None,
    typer.Option(
        metavar="K=V,...",
        rich_help_panel=ATTENTION,
        show_default=False,
        help="Other backends for single denoisers, such as transformer_2=torch_sdpa; several are separated by commas.",
    ),
]
Strict = Annotated[
    bool | None,
    typer.Option(
        "--strict",
        rich_help_panel=ATTENTION,
        show_default=False,
        help="Fail where a sparse backend would run densely for a reason that nobody asked for.",
    ),
]
OutputPath = Annotated[
    str | None, typer.Option(metavar="FOLDER", rich_help_panel=OUTPUT, show_default="outputs", help="Where results go; made if missing.")
]
OutputFileName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=OUTPUT,
        show_default="prompt, time and a hash",
        help="Name of the result, with or without .mp4 or .png. The record of the run is written beside it, as .json.",
    ),
]
PerfDumpPath = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", rich_help_panel=OUTPUT, show_default=False, help="JSON with times per stage and step, and the attention report."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(rich_help_panel=MACHINE, show_default="cuda or npu if there is one, else cpu", help="torch device, such as cuda:1."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=MACHINE, show_default="bfloat16, on the CPU float32", help="Of the weights: float32, bfloat16 or float16."
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", rich_help_panel=MACHINE, show_default=False, help="Show the traceback of an error and debug messages.")
]
