"""What a configuration may say of servers: their addresses, and what they can do for a run.

The checks take the sections that `sections.py` defines, which imports this file.
"""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator

from esr_train.config.errors import ConfigError


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or beyond 65535
        good = False
    if not good or parts.query or parts.fragment or parts.username or url.split() != [url]:
        raise ValueError("must be http://HOST:PORT or https://HOST:PORT, with or without /v1")
    return url


# Of a server that speaks OpenAI's completions API, as vLLM and SGLang do
Url = Annotated[str, AfterValidator(_address)]


def check_teacher(teacher: Any) -> None:
    """Raise ConfigError unless its keys are those of a teacher here, or of one on a server."""
    for key in ("adapter", "drop_layers", "placement") if teacher.url else ():
        if getattr(teacher, key):
            raise ConfigError(
                f"teacher.{key}: got {getattr(teacher, key)!r}, must be left out where "
                "teacher.url is set: the server has the teacher as it serves it, and its adapters "
                "have names there, for teacher.served_name"
            )
    for key in () if teacher.url else ("served_name", "logprobs"):
        value = getattr(teacher, key)
        if value != type(teacher).model_fields[key].default:
            raise ConfigError(
                f"teacher.{key}: got {value!r}, must be left out where teacher.url is not set: it "
                "is for a teacher on a server"
            )


def check_served_rollout(rollout: Any) -> None:
    """Raise ConfigError if a server is named that could not sample, or a model without a server."""
    if rollout.url and rollout.source == "student":
        raise ConfigError(
            f"rollout.url: got {rollout.url!r}, must be null where rollout.source is 'student': a "
            "server does not get the weights of each step. It samples for initial_student and "
            "teacher"
        )
    if rollout.served_name is not None and not rollout.url:
        raise ConfigError(
            f"rollout.served_name: got {rollout.served_name!r}, must be left out where rollout.url "
            "is not set: it is the name of a model there"
        )


def check_served_losses(config: Any) -> None:
    """Raise ConfigError if more is wanted of a teacher on a server than it gives: log-probs of some
    tokens at temperature 1, and no hidden states."""
    if config.teacher.url is None:
        return
    loss, evaluation = config.loss, config.eval
    known = ("forward_kl", "reverse_kl", "cross_entropy")
    for key, value, fits, allowed in (
        ("loss.divergence", loss.divergence, loss.divergence in known, f"one of {known}"),
        ("loss.temperature", loss.temperature, loss.temperature == 1, "1"),
        ("loss.merge_terminators", True, not loss.merge_terminators, "false"),
        ("loss.select_by", loss.select_by, not loss.select_by, "left out"),
        ("eval.teacher_text", evaluation.teacher_text, not evaluation.teacher_text, "0"),
        ("eval.student_text", evaluation.student_text, not evaluation.student_text, "0"),
    ):
        if not fits:
            raise ConfigError(
                f"{key}: got {value!r}, must be {allowed} where teacher.url is set: a server "
                "gives log-probs of its most probable tokens only"
            )
