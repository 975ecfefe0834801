"""What is written about a run: the side-car beside the result, the performance dump, and the lines a person reads."""

from __future__ import annotations

import platform as python_platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ditattn._version import __version__
from ditattn.packages import ATTENTIONS, MINDIESD, SGL_KERNEL_NPU, TORCH_NPU, TRITON

if TYPE_CHECKING:
    from ditattn.hosts.diffusers.call import CallTimes
    from ditattn.quantization.report import QuantizationReport
    from ditattn.runtime.report import AttentionReport

__all__ = ["RunRecord", "versions"]

# the names that sglang's own dumps have, so that scripts can compare the two
STAGE_NAMES = {
    "encode": "TextEncodingStage",
    "denoise": "DenoisingStage",
    "decode": "DecodingStage",
    "generate": "GenerationStage",
    "write": "OutputStage",
}


# what computes attention on some devices
KERNEL_PACKAGES = tuple(package.module for package in (TORCH_NPU, TRITON, MINDIESD, SGL_KERNEL_NPU, ATTENTIONS))


def versions() -> dict[str, str | None]:
    """Of everything that can change a result. Packages with kernels are named only where they are installed."""
    found: dict[str, str | None] = {"ditattn": __version__, "python": python_platform.python_version()}
    found |= {package: _version(package) for package in ("torch", "diffusers", "transformers")}
    return found | {package: number for package in KERNEL_PACKAGES if (number := _version(package)) is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass
class RunRecord:
    """Everything known about one result.

    Attributes:
        model: path, pipeline class, whether it is the demo model, whether its weights are random.
        given: settings from the file and the command line.
        effective: settings that held, those of the model included.
        device: type and name.
        dtype: of the weights.
        seed, prompt: of this result.
        output: file, size, frames, rate.
        load_ms, write_ms: times around the call.
        times: of the call.
        attention: what the attention did.
        ranks: what it did in each of several processes; empty where there is one.
        quantization: what became of the linear layers; None if nothing was asked of them.
    """

    model: dict[str, Any]
    given: dict[str, Any]
    effective: dict[str, Any]
    device: dict[str, str]
    dtype: str
    seed: int
    prompt: str
    output: dict[str, Any]
    load_ms: float
    times: CallTimes
    attention: AttentionReport
    ranks: list[AttentionReport] = field(default_factory=list)
    quantization: QuantizationReport | None = None
    write_ms: float = 0.0

    def sidecar(self) -> dict[str, Any]:
        """The JSON beside the result: enough to repeat the run and to trust what it says."""
        return {
            "created": _now(),
            "model": self.model,
            "prompt": self.prompt,
            "seed": self.seed,
            "settings": {"given": self.given, "effective": self.effective},
            "output": self.output,
            "versions": versions(),
            "device": self.device,
            "dtype": self.dtype,
            "times_ms": {"load": self.load_ms, **self.times.stages, "write": self.write_ms},
            "steps_ms": self.times.steps,
            "attention": self.attention.as_dict(),
            **self._linear_layers(),
            **({"attention_of_ranks": [report.as_dict() for report in self.ranks]} if self.ranks else {}),
        }

    def perf_dump(self) -> dict[str, Any]:
        """sglang's keys, plus `attention`. Loading the model is no part of the total.

        There is no `commit_hash`: an installed package does not know it.
        """
        stages = {**self.times.stages, "write": self.write_ms}
        return {
            "timestamp": _now(),
            "request_id": str(uuid4()),
            "tag": "ditattn",
            "total_duration_ms": sum(stages.values()),
            "steps": [{"name": STAGE_NAMES[name], "duration_ms": duration_ms} for name, duration_ms in stages.items()],
            "denoise_steps_ms": [{"step": step, "duration_ms": duration_ms} for step, duration_ms in enumerate(self.times.steps)],
            "memory_checkpoints": {f"after_{STAGE_NAMES[name]}": sizes for name, sizes in self.times.memory.items()},
            "meta": {"prompt": self.prompt, "model": self.model["path"], "ditattn": __version__},
            "attention": self.attention.as_dict(),
            **self._linear_layers(),
        }

    def _linear_layers(self) -> dict[str, Any]:
        return {} if self.quantization is None else {"quantization": self.quantization.as_dict()}

    def summary(self) -> str:
        """The last lines: what ran sparse, at what density, why calls were dense, the times, the file."""
        denoise_ms = self.times.stages.get("denoise", self.times.total_ms)
        share = f" ({100 * self.attention.attention_ms / denoise_ms:.0f} % of denoising)" if denoise_ms else ""
        stages = ", ".join(f"{name} {duration_ms / 1e3:.1f} s" for name, duration_ms in self.times.stages.items())
        return "\n".join(
            [
                self.attention.summary(),
                *([] if self.quantization is None else [self.quantization.summary()]),
                f"time: {stages}; attention {self.attention.attention_ms / 1e3:.1f} s{share}",
                *self._balance(),
                f"wrote {self.output['file']} and {Path(self.output['file']).with_suffix('.json').name}",
            ]
        )

    def _balance(self) -> list[str]:
        if not self.ranks:
            return []
        attention = ", ".join(f"{report.attention_ms / 1e3:.2f}" for report in self.ranks)
        exchanges = ", ".join(f"{report.communication_ms / 1e3:.2f}" for report in self.ranks)
        return [f"seconds by rank: attention {attention}; exchanges and waiting {exchanges}"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
