"""Where a frozen teacher is (`teacher.placement`): whole beside the student, in parts on several
processes, or whole on a device of its own."""

from __future__ import annotations

import torch

from esr_train.config import Config, ConfigError, TeacherConfig


def shares(config: Config, student: str, teacher: str) -> bool:
    """Whether the teacher uses the weights that the student has below its adapters; `student` and
    `teacher` are where each is loaded from.

    Raises:
        ConfigError: it would be cut into parts of weights that each process has anyway.
    """
    placement = config.teacher.placement
    if not config.student.lora or student != teacher:
        return False
    if placement == "fsdp" and not config.runtime.fsdp:
        raise ConfigError(
            "teacher.placement: got 'fsdp', must be null where student.lora trains adapters on the "
            "teacher's own weights: each process has these for the student"
        )
    return placement is None


def own_device(spec: TeacherConfig) -> torch.device | None:
    """Where to load a teacher that is not beside the student; one in parts, to be cut there.

    Raises:
        ConfigError: this machine has no such device.
    """
    if spec.placement is None:
        return None
    own = torch.device("cpu" if spec.placement == "fsdp" else spec.placement)
    count = torch.cuda.device_count()
    if own.type == "cuda" and (own.index or 0) >= count:
        there = f"cpu or cuda:0 to cuda:{count - 1}" if count else "cpu, for there is no GPU"
        raise ConfigError(f"teacher.placement: got {spec.placement!r}, must be {there}")
    return own


def check_processes(config: Config, processes: int) -> None:
    """Raise ConfigError unless so many processes can have the teacher where it is asked to be."""
    placement = config.teacher.placement
    if placement == "fsdp" and processes == 1:
        raise ConfigError(
            "teacher.placement: got 'fsdp', which cuts the teacher into parts for several "
            "processes, and this is one; start them by torchrun or accelerate launch"
        )
    if placement is not None and placement.startswith("cuda") and processes > 1:
        raise ConfigError(
            f"teacher.placement: got {placement!r}, must be fsdp, cpu or null on several "
            "processes, which would all put their teacher there"
        )
