"""Grader "python": the code of a response passes the tests that are the problem's answer.

The code runs in a process of its own, in a temporary directory and a namespace without network,
with limits on time, memory and the size of files. It can reach the files of this user: that stops
accidents, not an attacker. For code that may be hostile run the whole evaluation in a container.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
import tempfile

from esr_train.config import ConfigError
from esr_train.grading import Grader

SECONDS, MEMORY = 10, 1 << 30
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000


def python_grader() -> Grader:
    """Scores {"accuracy"}: 1.0 if the code, followed by the tests, ends without an error.

    Code is the last fenced block of the response, or all of it. A program that calls `exit` before
    its tests are through is wrong.

    Raises:
        ConfigError: this machine cannot run a process without network.
    """
    if not _passes("assert True"):
        raise ConfigError(
            "data.grader: 'python' needs Linux and user namespaces to run code without network; "
            "a trial process failed on this machine"
        )

    def grade(response: str, answer: str) -> dict[str, float]:
        blocks = _FENCE.findall(response)
        return {"accuracy": float(_passes(f"{blocks[-1] if blocks else response}\n\n{answer}"))}

    return grade


def _passes(program: str) -> bool:
    """Whether a program runs to its end without an error, within the limits."""
    # Printed last, and unknown to the program: a call of exit(0) does not pass for an end.
    token = os.urandom(16).hex()
    with tempfile.TemporaryDirectory() as directory:
        source = f"{program}\n\nimport sys\nsys.__stdout__.write('\\n{token}')\n"
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", source],
                cwd=directory,
                env={"PATH": os.environ.get("PATH", "")},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
                preexec_fn=_limit,
                start_new_session=True,
            )
        except (subprocess.SubprocessError, OSError, ValueError):  # ValueError: a null character
            return False
    return done.returncode == 0 and done.stdout.endswith(token.encode())


def _limit() -> None:
    """Runs in the child before the program."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_USER | _NEW_NETWORK) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
