"""torchrun's agent with two ranks of the command, forked: it starts, watches and ends them as it does those that it starts anew."""

from __future__ import annotations

import uuid

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ditattn.cli import main as command


def main(arguments: list[str]) -> None:
    """Returns when both ranks have ended well.

    Raises:
        ChildFailedError: one of them has not; the other was ended.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, _rank)(arguments)


def _rank(arguments: list[str]) -> None:
    # after a fork torch replaces its thread pool at the first use; where two threads came first at once, one of them found none
    torch.set_num_threads(1)
    command(arguments)
