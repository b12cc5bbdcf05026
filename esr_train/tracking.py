"""Accelerate's trackers: tensorboard, wandb, trackio, where a configuration asks for them.

tensorboard writes to RUN_DIR/arms/ARM/SEED/tensorboard; the others start a run of the project
`tracking.project`. Nothing is imported unless it is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esr_train.config import ConfigError, TrackingConfig


class Trackers:
    """The trackers of one run, whose name is the end of its directory: ARM/SEED.

    Raises:
        ConfigError: a package that is not installed.
    """

    def __init__(self, config: TrackingConfig, directory: Path) -> None:
        self._trackers: list[Any] = []
        check_trackers(config)
        if not config.trackers:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        run = "/".join(directory.parts[-2:])
        for name in config.trackers:
            kind = LOGGER_TYPE_TO_CLASS[name]
            if kind.requires_logging_directory:
                tracker = kind("tensorboard", logging_dir=directory)
            else:
                tracker = kind(config.project, name=run)
            tracker.start()
            self._trackers.append(tracker)

    def log(self, row: dict[str, Any], step: int) -> None:
        """The numbers of a row, those of mappings in it as section/key."""
        if self._trackers:
            values = dict(_numbers(row))
            for tracker in self._trackers:
                tracker.log(values, step=step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(config: TrackingConfig) -> None:
    """Raise ConfigError if a tracker that is asked for, or Accelerate, is not installed."""
    for name in config.trackers:
        for package in ("accelerate", name):
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"tracking.trackers: {name!r} needs a package that is not installed: "
                    f"pip install {package}"
                )


def _numbers(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}/")
        elif key == "alarms":
            yield f"{prefix}{key}", float(len(value))
        elif isinstance(value, (int, float)) and key != "step":
            yield prefix + key, float(value)
