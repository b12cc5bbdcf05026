"""How many programs a kernel launch has."""

from __future__ import annotations

# At least four waves on a large GPU, whose last is then a small share: an MI300X has room for 2,128
# programs of 4 warps and 70 registers at once, an H100 for 1,320.
_WANTED_PROGRAMS = 9216


def split_columns(rows: int, columns: int, block: int) -> tuple[int, int]:
    """(programs for each row, columns of each program), where a program takes whole blocks.

    With many rows there is one program a row. With few, each row is split until the launch has
    `_WANTED_PROGRAMS` programs, or a program for every block.
    """
    blocks = -(-columns // block)
    splits = min(blocks, -(-_WANTED_PROGRAMS // max(rows, 1)))
    width = -(-blocks // splits) * block
    return -(-columns // width), width
