"""What a diagnosis is doing: a line for each piece of work, and a bar while it lasts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Step = Callable[[int, int], None]  # (steps done, rows that are left)


class Progress:
    """Prints to stdout; bars are on stderr, and only on a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    def line(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)

    @contextmanager
    def piece(self, name: str, steps: int) -> Iterator[Step]:
        """A piece of work of about `steps` steps; the function that it gets moves the bar."""
        start = time.perf_counter()
        # disable=None: no bar where stderr is not a terminal
        with tqdm(total=steps, desc=name, leave=False, disable=self.quiet or None) as bar:

            def step(done: int, rows: int) -> None:
                bar.update(min(done, steps) - bar.n)

            yield step
        self.line(f"  {name}: {time.perf_counter() - start:.1f} s")
