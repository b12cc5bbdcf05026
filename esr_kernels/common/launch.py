"""How many programs a kernel launch has."""

from __future__ import annotations

# Fills a large GPU a few times over.
_WANTED_PROGRAMS = 1024


def split_columns(rows: int, columns: int, block: int) -> tuple[int, int]:
    """(programs for each row, columns of each program), where a program takes whole blocks.

    With many rows there is one program a row. With few, each row is split until the launch has
    `_WANTED_PROGRAMS` programs, or a program for every block.
    """
    blocks = -(-columns // block)
    splits = min(blocks, max(1, _WANTED_PROGRAMS // max(rows, 1)))
    width = -(-blocks // splits) * block
    return -(-columns // width), width
