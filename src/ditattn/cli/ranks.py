"""The command as one of several processes that torchrun started: who speaks, which device is whose, and how they begin and end together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ditattn.compare.rank_group import RankGroup
from ditattn.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["Rank", "own_device", "quiet", "rank_group", "speaks", "this_rank", "together"]

# torchrun sets them
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# what a rank whose partner is gone hears from gloo, nccl and hccl
PARTNER_GONE = ("gloo", "nccl", "hccl", "connection closed by peer", "connection reset by peer", "broken pipe")
# what gloo says of unequal parts of a result, which diffusers gathers as if they were equal
UNEQUAL_PARTS = "ProcessGroupGloo::allgather: invalid tensor size"
FAILED = "ditattn/failed"

_meeting: Any = None


@dataclass(frozen=True)
class Rank:
    """This process among those that torchrun started."""

    number: int
    count: int
    local: int

    @property
    def is_first(self) -> bool:
        return self.number == 0


def this_rank() -> Rank:
    """The only one, unless torchrun started several."""
    if not all(os.environ.get(name) for name in VARIABLES):
        return Rank(0, 1, 0)
    return Rank(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def rank_group() -> RankGroup:
    """All of them, to talk to each other."""
    rank = this_rank()
    return RankGroup(rank.number, rank.count)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only the first rank talks while the block runs."""
    if this_rank().is_first:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def own_device(name: str | None) -> str | None:
    """The device that a rank takes where the user named `name`: its own one of several.

    Raises:
        ConfigError: one device for all ranks.
    """
    rank = this_rank()
    if rank.count == 1 or name == "cpu":
        return name
    if name is not None and ":" in name:
        raise ConfigError(f"--device {name} names one device for {rank.count} processes: name its type alone, each takes its own")
    device_type = _accelerator() if name is None else name
    return None if device_type is None else f"{device_type}:{rank.local}"


def _accelerator() -> str | None:
    import torch

    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else None  # type: ignore[union-attr]


@contextlib.contextmanager
def together(wanted: int, device: torch.device) -> Iterator[Rank]:
    """The ranks, of which so many are wanted, have met while the block runs.

    Raises:
        ConfigError: torchrun started another number of processes.
    """
    global _meeting
    rank = this_rank()
    if wanted != rank.count:
        raise ConfigError(_wrong_count(rank.count, wanted))
    if rank.count == 1:
        yield rank
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    _meeting, number, count = next(iter(rendezvous("env://")))
    dist.init_process_group(store=dist.PrefixStore("ditattn/ranks", _meeting), rank=number, world_size=count)
    yield rank
    # only ranks that succeeded wait for each other
    dist.destroy_process_group()


def _wrong_count(processes: int, wanted: int) -> str:
    if processes == 1:
        return (
            f"--ulysses-degree, --ring-degree and --cfg-parallel ask for {wanted} processes: "
            f"start with torchrun --nproc-per-node {wanted} -m ditattn ..."
        )
    return (
        f"torchrun started {processes} processes: --ulysses-degree times --ring-degree, and twice that with --cfg-parallel, "
        f"must be {processes}, not {wanted}"
    )


def speaks(error: BaseException) -> str | None:
    """None if another rank tells why the run fails; else what to say in place of the error, empty for its own words."""
    rank = this_rank()
    if rank.count == 1:
        return ""
    if _meeting is None:
        # before they met every rank fails alike
        return "" if rank.is_first else None
    with contextlib.suppress(RuntimeError):
        # a store that is gone counts nobody: then every rank that can still speak does
        if _meeting.add(FAILED, 1) > 1:
            return None
    if isinstance(error, RuntimeError) and UNEQUAL_PARTS in str(error):
        return (
            "error: gloo, by which processes talk on a CPU, gathers equal parts of a result alone: choose a size whose tokens are a "
            f"multiple of the degree, or fewer than {rank.count} processes"
        )
    if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in PARTNER_GONE):
        return f"error: another one of the {rank.count} processes ended"
    return ""
