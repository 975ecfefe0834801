"""Every key of `generate`, `compare` and `tune`: its type, range, default, help and panel, declared once.

The keys are those of a configuration file; `options.py` makes the command line from them. Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, FiniteFloat

from ditattn.backends.config import SparseAttentionConfig
from ditattn.backends.registry import DEFAULT_BACKEND, RECOMMENDED_BACKEND, backend_names
from ditattn.errors import ConfigError
from ditattn.quantization.request import METHODS
from ditattn.tune.candidate import TUNED_KEYS
from ditattn.values import KnownKeys, parse_config, parse_value

__all__ = [
    "PANELS",
    "PIPELINE_KEYS",
    "CallSettings",
    "CommandOptions",
    "CompareSettings",
    "GenerateSettings",
    "Option",
    "TuneSettings",
    "flag",
    "read_settings",
]

SettingsT = TypeVar("SettingsT", bound="CallSettings")

PANELS = TARGET, MODEL, SAMPLING, ATTENTION, QUANTIZATION, OUTPUT, MACHINE = (
    "Target",
    "Model",
    "Sampling",
    "Attention",
    "Quantisation",
    "Output",
    "Machine",
)

# settings that are arguments of the pipeline's call, under the same name
PIPELINE_KEYS = ("prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")

THE_MODELS = "the model's"


@dataclass(frozen=True)
class Option:
    """What the command line adds to a key.

    Attributes:
        panel: of the help text, one of PANELS.
        help: a sentence or two.
        default: the words shown for it, where they are not the default itself.
        metavar: what stands for the value.
        repeated: it may be given several times; follows from the type, but for keys whose values are texts with a form of their own.
        before: the key before which it is listed; None lists it at the end of its panel.
    """

    panel: str
    help: str
    default: str | None = None
    metavar: str | None = None
    repeated: bool = False
    before: str | None = None


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, (str, int, dict)) else value


def _parsed(value: Any) -> Any:
    return parse_config(value) if isinstance(value, str) else value


def _without_null(path: str) -> str:
    # no shell passes one, but a configuration file can
    if "\0" in path:
        raise ValueError("a path holds no null character")
    return path


def _axes(value: Any) -> Any:
    """`["sparsity=0.5,0.75", ...]` as {"sparsity": [0.5, 0.75], ...}."""
    if not isinstance(value, (list, str)):
        return value
    axes: dict[str, list[Any]] = {}
    for text in [value] if isinstance(value, str) else value:
        key, equals, values = str(text).partition("=")
        found = [parse_value(key.strip(), piece) for piece in values.split(",")]
        if not equals or not key.strip() or None in found:
            raise ValueError(f"{text!r} is not of the form key=value,value")
        if key.strip() in axes:
            raise ValueError(f"{key.strip()} is named twice")
        axes[key.strip()] = found
    return axes


Texts = Annotated[list[str], BeforeValidator(_one_or_more)]
Pairs = Annotated[dict[str, Any], BeforeValidator(_parsed)]
Names = Annotated[dict[str, str], BeforeValidator(_parsed)]
# no shell expands ~ in a file, nor bash in --output-path=~/videos, which would make a folder of that name
UserPath = Annotated[str, AfterValidator(os.path.expanduser), AfterValidator(_without_null)]
# beyond these torch, the scheduler or ffmpeg fails with words of its own
Count = Annotated[int, Field(ge=1, le=1_000_000)]
FrameRate = Annotated[int, Field(ge=1, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[list[Seed], BeforeValidator(_one_or_more), Field(min_length=1)]
ManyPairs = Annotated[list[Pairs], BeforeValidator(_one_or_more)]
Grid = Annotated[dict[str, list[Any]], BeforeValidator(_axes)]

BACKEND_NAMES = ", ".join(backend_names())
COMPARED_NAMES = ", ".join(name for name in backend_names() if name != DEFAULT_BACKEND)
SPARSE_KEYS = ", ".join(SparseAttentionConfig.model_fields)
FIXED_KEYS = ", ".join(key for key in SparseAttentionConfig.model_fields if key not in (*TUNED_KEYS, "preset"))

QUANTIZATION_NAMES = ", ".join(METHODS)
SKIPPED_LAYERS = Option(
    QUANTIZATION, "Linear layers that stay as they are: 'blocks.0.*', '*.ffn.*'. Repeat it for several patterns.", metavar="PATTERN"
)

CACHE_NAMES = "first_block, pyramid_attention_broadcast, faster, mag, taylorseer or sea"
SAME_AS_FILE = "none, or what the file of --attention-backend-config was tuned beside"
CACHE_KEYS = "those of diffusers' configuration class: k=v,k=v (threshold=0.1), JSON text, or a file."
# of the step cache that is named beside it, where there is one alone
StepCacheKeys = Annotated[Pairs, Option(ATTENTION, f"Its keys, {CACHE_KEYS}", metavar="CONFIG")]

SEEDS = Option(SAMPLING, "Seed of the noise. Repeat it for several: every prompt is made with every seed.")


class CommandOptions(KnownKeys):
    """Options that no configuration file holds."""

    config: Annotated[
        str | None,
        Option(
            MODEL,
            "JSON or YAML file with any of these options, in snake_case (num_frames: 81). The command line wins over the file.",
            metavar="FILE",
            before="revision",
        ),
    ] = None
    debug: Annotated[bool, Option(MACHINE, "Show the traceback of an error and debug messages.")] = False


class CallSettings(KnownKeys):
    """Keys of every verb that runs a pipeline. None leaves the choice to the model."""

    model_path: Annotated[
        str | None,
        Option(
            MODEL,
            "A folder that diffusers' save_pretrained wrote, or a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers. "
            "Only safetensors weights are loaded. Without it: the small demo model of the package.",
        ),
    ] = None
    revision: Annotated[str | None, Option(MODEL, "Branch, tag or commit of a hub repository.")] = None
    trust_remote_code: Annotated[bool, Option(MODEL, "Run Python code that comes with the model.")] = False
    prompt: Annotated[Texts, Option(SAMPLING, "What to make. Repeat it for several results; the model is loaded once.")] = Field(
        default_factory=list
    )
    negative_prompt: Annotated[str | None, Option(SAMPLING, "What to avoid.")] = None
    image_path: Annotated[UserPath | None, Option(SAMPLING, "First frame, for image-to-video models.", metavar="FILE")] = None
    height: Annotated[Count | None, Option(SAMPLING, "Height of the result, in pixels.", THE_MODELS)] = None
    width: Annotated[Count | None, Option(SAMPLING, "Width of the result, in pixels.", THE_MODELS)] = None
    num_frames: Annotated[Count | None, Option(SAMPLING, "Number of frames of a video; 1 makes an image.", THE_MODELS)] = None
    fps: Annotated[FrameRate | None, Option(SAMPLING, "Frames per second of a video.", THE_MODELS)] = None
    num_inference_steps: Annotated[Count | None, Option(SAMPLING, "Number of denoising steps.", THE_MODELS)] = None
    guidance_scale: Annotated[FiniteFloat | None, Option(SAMPLING, "Strength of the prompt (classifier-free guidance).", THE_MODELS)] = None
    component_attention_backends: Annotated[
        Names,
        Option(
            ATTENTION,
            "Another backend for one of several denoisers: transformer_2=torch_sdpa. Separate several by commas.",
            metavar="K=V,...",
        ),
    ] = Field(default_factory=dict)
    strict: Annotated[
        bool,
        Option(
            ATTENTION,
            "Fail if a call falls back to dense attention for a reason that no setting asks for, or if the whole clip would be dense.",
        ),
    ] = False
    output_path: Annotated[UserPath, Option(OUTPUT, "Where results go; made if missing.", metavar="FOLDER")] = "outputs"
    output_file_name: Annotated[str | None, Option(OUTPUT, "Name of the result.")] = None
    device: Annotated[str | None, Option(MACHINE, "torch device, such as cuda:1.", "cuda or npu if there is one, else cpu")] = None
    dtype: Annotated[
        str | None,
        Option(MACHINE, "Type of the weights: float32, bfloat16 or float16.", "bfloat16, on a CPU without instructions for it float32"),
    ] = None
    ulysses_degree: Annotated[
        Count,
        Option(
            MACHINE,
            "Processes that share the heads of every layer; torchrun starts them: torchrun --nproc-per-node 2 -m ditattn ...",
        ),
    ] = 1
    ring_degree: Annotated[
        Count,
        Option(MACHINE, "Processes that share the queries, each with all keys; times --ulysses-degree it is the number of processes."),
    ] = 1
    cfg_parallel: Annotated[
        bool,
        Option(MACHINE, "Each half of the processes makes one branch of classifier-free guidance; doubles the number of processes."),
    ] = False
    uneven_split: Annotated[
        bool, Option(MACHINE, "Let processes have unequal shares, where heads or tokens do not divide. One of the two degrees must be 1.")
    ] = False

    @property
    def num_processes(self) -> int:
        """That torchrun must start."""
        return self.ulysses_degree * self.ring_degree * (2 if self.cfg_parallel else 1)

    @property
    def split(self) -> dict[str, Any]:
        """How a denoiser is split between them, as arguments of `split_denoisers`; empty for one process."""
        if self.num_processes == 1:
            return {}
        degrees = {"ulysses_degree": self.ulysses_degree, "ring_degree": self.ring_degree, "cfg_parallel": self.cfg_parallel}
        if not self.uneven_split or self.ulysses_degree * self.ring_degree == 1:
            return degrees
        return {**degrees, "ulysses_anything" if self.ring_degree == 1 else "ring_anything": True}


class GenerateSettings(CallSettings):
    """Make a video or an image with a diffusers pipeline, its self-attention served by the backend you name.

    A .json file beside the result records every setting, version and time, and what the attention really did.
    """

    seed: Annotated[Seed, Option(SAMPLING, "Seed of the noise, which is drawn on the CPU: the same on every device.")] = 42
    attention_backend: Annotated[
        str | None,
        Option(
            ATTENTION,
            f"Serves the self-attention of the denoiser: {BACKEND_NAMES}. 'ditattn backends' says which are sparse, and what each needs.",
            default="DITATTN_ATTENTION_BACKEND, else the device's best dense one",
            metavar="NAME",
            before="component_attention_backends",
        ),
    ] = None
    attention_backend_config: Annotated[
        Pairs,
        Option(
            ATTENTION,
            "Settings of the backend: sparsity=0.5,skip_first_steps=20%, JSON text, or a .json or .yaml file. "
            f"Keys of the sparse ones: {SPARSE_KEYS}.",
            metavar="CONFIG",
            before="component_attention_backends",
        ),
    ] = Field(default_factory=dict)
    cache: Annotated[
        str | None,
        Option(
            ATTENTION,
            f"Step cache of diffusers beside it, which skips layers in steps that change little: {CACHE_NAMES}.",
            default=SAME_AS_FILE,
            metavar="NAME",
        ),
    ] = None
    cache_config: StepCacheKeys = Field(default_factory=dict)
    quantization: Annotated[
        str | None,
        Option(
            QUANTIZATION,
            f"Linear layers of the denoiser in FP4: {QUANTIZATION_NAMES}, or the folder of an msmodelslim checkpoint. It saves memory, and "
            "time at most on Ascend 950.",
            metavar="NAME",
        ),
    ] = None
    quantization_skip: Annotated[Texts, SKIPPED_LAYERS] = Field(default_factory=list)
    output_file_name: Annotated[
        str | None,
        Option(
            OUTPUT,
            "Name of the result, with or without .mp4 or .png. The record of the run is written beside it, as .json.",
            default="prompt, time and a hash",
            metavar="NAME",
        ),
    ] = None
    perf_dump_path: Annotated[
        UserPath | None, Option(OUTPUT, "JSON with times per stage and step, and the attention report.", metavar="FILE")
    ] = None


class CompareSettings(CallSettings):
    """Measure how fast and how good settings are, against dense attention with the same prompts and seeds.

    Writes one self-contained HTML page and the same numbers as JSON.
    """

    target_psnr: Annotated[
        FiniteFloat | None,
        Field(ge=1),
        Option(
            OUTPUT, "Decibels that you want to keep: the result then names the fastest setting that keeps them, and the page marks them."
        ),
    ] = None
    seed: Annotated[Seeds, SEEDS] = Field(default_factory=lambda: [42])
    attention_backend: Annotated[
        Texts,
        Option(
            ATTENTION,
            f"What to compare with {DEFAULT_BACKEND}: {COMPARED_NAMES}. Repeat it for several.",
            metavar="NAME",
            before="component_attention_backends",
        ),
    ] = Field(default_factory=list)
    attention_backend_config: Annotated[
        ManyPairs,
        Option(
            ATTENTION,
            "Settings: sparsity=0.5,skip_first_steps=20%, JSON text, or a .json or .yaml file. Repeat it for several: "
            "every backend runs with each of them.",
            metavar="CONFIG",
            before="component_attention_backends",
        ),
    ] = Field(default_factory=list)
    grid: Annotated[
        Grid,
        Option(
            ATTENTION,
            "Values of a key to compare: sparsity=0.5,0.75,0.9. Repeat it for several keys: all combinations run.",
            metavar="K=V,V,...",
            repeated=True,
            before="component_attention_backends",
        ),
    ] = Field(default_factory=dict)
    cache: Annotated[
        Texts,
        Option(
            ATTENTION,
            f"Step cache of diffusers: {CACHE_NAMES}. Repeat it for several: each is compared alone, with {DEFAULT_BACKEND}, and beside "
            "every setting, which is compared without it too.",
            metavar="NAME",
        ),
    ] = Field(default_factory=list)
    cache_config: Annotated[
        ManyPairs,
        Option(ATTENTION, f"Keys of the caches, {CACHE_KEYS} Repeat it for several: every cache runs with each of them.", metavar="CONFIG"),
    ] = Field(default_factory=list)
    quantization: Annotated[
        Texts,
        Option(
            QUANTIZATION,
            f"Linear layers in FP4: {QUANTIZATION_NAMES}, none, or the folder of an msmodelslim checkpoint. Repeat it for several: every "
            f"setting runs with each of them. Without --attention-backend it runs beside {DEFAULT_BACKEND}.",
            metavar="NAME",
        ),
    ] = Field(default_factory=list)
    quantization_skip: Annotated[Texts, SKIPPED_LAYERS] = Field(default_factory=list)
    output_file_name: Annotated[
        str | None, Option(OUTPUT, "Name of the page (.html) and of the numbers (.json).", "prompt, time and a hash", metavar="NAME")
    ] = None
    save_videos: Annotated[bool, Option(OUTPUT, "Also write every clip of every setting, as .mp4 or .png beside the page.")] = False
    repeats: Annotated[Count, Option(MACHINE, "Runs per clip and setting; times are medians.")] = 1
    probe: Annotated[bool, Option(MACHINE, "Leave out the dropped softmax mass, which costs one more dense run.")] = True
    reference_cache: Annotated[
        bool, Option(MACHINE, "Make the dense references anew instead of taking those of earlier runs, and keep none.")
    ] = True


class TuneSettings(CallSettings):
    """Find the fastest setting whose worst clip still meets a quality target, and check it on clips it was not tuned on.

    Writes a YAML file for --attention-backend-config. Interrupted, it keeps what it found; the same command goes on from there.
    Exit status 3: nothing meets the target faster than dense.
    """

    target_psnr: Annotated[
        FiniteFloat | None, Field(ge=1), Option(TARGET, "PSNR against dense that the worst clip must reach, in decibels.")
    ] = None
    target_ssim: Annotated[float | None, Field(ge=0, le=1), Option(TARGET, "SSIM that the worst clip must reach too, 0 to 1.")] = None
    budget_runs: Annotated[Count, Option(TARGET, "Number of settings to try at most, each on all clips.")] = 12
    check_prompt: Annotated[
        Texts,
        Option(
            SAMPLING,
            "What the result is checked on. Repeat it for several.",
            default="the prompts, with other seeds",
            before="negative_prompt",
        ),
    ] = Field(default_factory=list)
    seed: Annotated[Seeds, SEEDS] = Field(default_factory=lambda: [42])
    attention_backend: Annotated[
        str, Option(ATTENTION, "The sparse backend whose setting is searched.", metavar="NAME", before="component_attention_backends")
    ] = RECOMMENDED_BACKEND
    attention_backend_config: Annotated[
        Pairs,
        Option(
            ATTENTION,
            f"Keys to hold fixed: {FIXED_KEYS}. The search sets sparsity and the skip_ keys.",
            metavar="CONFIG",
            before="component_attention_backends",
        ),
    ] = Field(default_factory=dict)
    cache: Annotated[
        str | None,
        Option(
            ATTENTION,
            f"Step cache of diffusers that is on in every run but the dense ones: {CACHE_NAMES}. The target counts what it costs; "
            "it is measured alone first.",
            default=SAME_AS_FILE,
            metavar="NAME",
        ),
    ] = None
    cache_config: StepCacheKeys = Field(default_factory=dict)
    output_file_name: Annotated[str | None, Option(OUTPUT, "Name of the .yaml file.", "tune_ and a hash", metavar="NAME")] = None


def flag(key: str) -> str:
    """The option of a key, as users type it."""
    return "--" + key.replace("_", "-")


def read_settings(cls: type[SettingsT], options: Mapping[str, Any], config: str | None = None) -> SettingsT:
    """Settings from a configuration file and from the command line, which wins.

    Args:
        cls: the settings of the verb.
        options: what the command line gave.
        config: path of a JSON or YAML file with the same names in snake_case.

    Raises:
        UnknownKey: a key of the file that does not exist, with the nearest one that does.
        ConfigError: a wrong value, a missing prompt, an unreadable file.
    """
    values = {**(parse_config("@" + config) if config else {}), **options}
    settings = cls.from_mapping(values)
    if not settings.prompt or not all(prompt.strip() for prompt in settings.prompt):
        raise ConfigError("a prompt is needed: --prompt TEXT, or the key 'prompt' in the --config file")
    return settings
