"""What a user names in a configuration by its import path, "package.module:name"."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from esr_train.config import ConfigError


def imported(key: str, path: str) -> Callable[..., Any]:
    """The function or class at `path`, the value of the configuration's `key`.

    Raises:
        ConfigError: it cannot be imported, or is no function and no class.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: an empty part
        raise ConfigError(f"{key}: got {path!r}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{key}: {path!r} is not a function")
    made: Callable[..., Any] = found
    return made
