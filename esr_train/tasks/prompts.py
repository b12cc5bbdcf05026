"""Chat prompts, one per line, for distilling real language models; there is no score.

`prompts.txt` in this directory is the default; any UTF-8 text file with one prompt per line works.
Every fifth distinct line is held out, so the splits are disjoint for every seed.
"""

from __future__ import annotations

import random
from pathlib import Path

from esr_train.tasks import Problem, check_request

BUILTIN_FILE = Path(__file__).with_name("prompts.txt")
_HELDOUT_EVERY = 5


class PromptsTask:
    """Prompts from a text file, shuffled by seed.

    Raises:
        ValueError: if the file is missing, is not UTF-8 text, or holds no prompt.
    """

    name = "prompts"

    def __init__(self, path: Path = BUILTIN_FILE) -> None:
        lines = [line.strip() for line in _read(path).splitlines()]
        # A line that occurs twice could otherwise be in both splits.
        distinct = list(dict.fromkeys(line for line in lines if line))
        if not distinct:
            raise ValueError(f"prompt file: {str(path)!r} holds no prompt; write one a line")
        heldout = distinct[_HELDOUT_EVERY - 1 :: _HELDOUT_EVERY]
        self._path = path
        self._lines = {
            "train": [line for line in distinct if line not in set(heldout)],
            "heldout": heldout,
        }

    def count(self, split: str) -> int:
        """Distinct prompts of a split."""
        return len(self._lines[split])

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """`count` different prompts of `split`, shuffled.

        Raises:
            ValueError: for more than there are; repeats would look like data.
        """
        check_request(split, count)
        lines = self._lines[split]
        if count > len(lines):
            raise ValueError(
                f"count: got {count}, but {str(self._path)!r} has {len(lines)} {split} prompts "
                f"(every {_HELDOUT_EVERY}th line is held out)"
            )
        found = random.Random(f"{split}:{seed}").sample(lines, len(lines))
        return [Problem((("user", line),)) for line in found[:count]]

    def score(self, problem: Problem, response: str) -> None:
        """None: these prompts have no checkable answer."""
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"prompt file: cannot read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file: {str(path)!r} is not UTF-8 text") from error
