"""What a launcher has started: this process alone, or several (torchrun, `accelerate launch`)."""

from __future__ import annotations

import os

import torch.distributed as dist

from esr_train.config import Config, ConfigError
from esr_train.placement import check_processes
from esr_train.world import ONE, World


def launched() -> int:
    """How many processes a launcher has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def speaks(error: BaseException) -> bool:
    """Whether this process says an error. A configuration that is refused before the processes have
    met is refused by all, and said by the first one of each machine."""
    same = isinstance(error, ConfigError) and launched() > 1
    met = dist.is_available() and dist.is_initialized()
    return met or not same or os.environ.get("LOCAL_RANK", os.environ["RANK"]) == "0"


def start(config: Config) -> World:
    """This process's world, after it has found the others of its launcher.

    Raises:
        ConfigError: `runtime.fsdp` or `teacher.placement` ask for another number of processes, or
            options of `accelerate launch` would have no effect.
    """
    for engine in ("FSDP", "DEEPSPEED"):
        ignored = engine != "FSDP" or not config.runtime.fsdp
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false") == "true" and ignored:
            raise ConfigError(
                f"accelerate launch --use_{engine.lower()} has no effect here: leave it out; "
                "runtime.fsdp=true shards the student"
            )
    check_processes(config, launched())
    if launched() == 1:
        if config.runtime.fsdp:
            raise ConfigError(
                "runtime.fsdp: shards the student over several processes, and this is one; start "
                "them by torchrun or accelerate launch"
            )
        return ONE
    # Imported here: they import much of torch.distributed.
    if config.runtime.fsdp:
        from esr_train.fsdp import ShardedRanks

        return ShardedRanks()
    if config.teacher.placement == "fsdp":
        from esr_train.sharded import PartRanks

        return PartRanks()
    from esr_train.distributed import Ranks

    return Ranks()
