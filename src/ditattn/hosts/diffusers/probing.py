"""One dense run of a pipeline in which every sparse setting is tried on every attention call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditattn.hosts.diffusers.call import call_pipeline
from ditattn.hosts.diffusers.install import Request, denoisers, install, serve
from ditattn.models import find_family, unwrapped
from ditattn.runtime.probe import CellReading, SparseProbe
from ditattn.runtime.stage import ServedModel

__all__ = ["probe_run"]


def probe_run(pipe: Any, arguments: Mapping[str, Any], *, seed: int, requests: Sequence[Request]) -> list[list[CellReading]]:
    """Run the pipeline densely once and try every request on its attention calls.

    Args:
        pipe: a loaded pipeline.
        arguments, seed: of its call, see `call_pipeline`.
        requests: backends and configurations to try.

    Returns:
        The readings of each request, cell by cell. Components that a request serves densely, and unknown models, have none.

    Raises:
        what `install` and `call_pipeline` raise.
    """
    probe = SparseProbe([_sparse_models(pipe, request) for request in requests])
    with install(pipe, "torch_sdpa") as handle:
        handle.watch(probe)
        call_pipeline(pipe, arguments, seed=seed)
    return [probe.readings(number) for number in range(len(requests))]


def _sparse_models(pipe: Any, request: Request) -> dict[str, ServedModel]:
    served = {}
    for name, module in denoisers(pipe).items():
        module = unwrapped(module)
        family = find_family(type(module).__name__)
        if family is not None:
            served[name] = serve(module, name, family, request)
    return {name: model for name, model in served.items() if model.backend.is_sparse}
