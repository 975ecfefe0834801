"""One dense run of a pipeline in which every sparse setting is tried on every attention call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditattn.backends.setting import Setting
from ditattn.hosts.diffusers.call import call_pipeline
from ditattn.hosts.diffusers.install import denoisers, install, serve
from ditattn.models import find_family
from ditattn.runtime.probe import CellReading, SparseProbe
from ditattn.runtime.stage import ServedModel

__all__ = ["probe_run"]


def probe_run(pipe: Any, arguments: Mapping[str, Any], *, seed: int, settings: Sequence[Setting]) -> list[list[CellReading]]:
    """Run the pipeline densely once and try every setting on its attention calls.

    Args:
        pipe: a loaded pipeline.
        arguments, seed: of its call, see `call_pipeline`.
        settings: what to try.

    Returns:
        The readings of each setting, cell by cell. Components that a setting serves densely, and unknown models, have none.

    Raises:
        what `install` and `call_pipeline` raise.
    """
    probe = SparseProbe([_sparse_models(pipe, setting) for setting in settings])
    with install(pipe, "torch_sdpa") as handle:
        handle.watch(probe)
        call_pipeline(pipe, arguments, seed=seed)
    return [probe.readings(number) for number in range(len(settings))]


def _sparse_models(pipe: Any, setting: Setting) -> dict[str, ServedModel]:
    served = {}
    for name, module in denoisers(pipe).items():
        module = getattr(module, "_orig_mod", module)
        family = find_family(type(module).__name__)
        if family is not None:
            served[name] = serve(module, name, family, setting)
    return {name: model for name, model in served.items() if model.backend.is_sparse}
