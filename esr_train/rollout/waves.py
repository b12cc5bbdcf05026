"""Which responses are decoded at the same time, and in which rows of the buffers.

Buffers have places for P prompts and rows for B responses, as many as a budget of tokens allows.
Responses enter in order, as soon as a row and their prompt's place are free. Once none waits, rows
that are left move to the front, and a step computes only the first b of them: all batch sizes use
the same buffers. Nothing here touches a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

# New responses enter once this share of the rows is free: a prefill for few is a poor product.
_ENTER = 0.25


class Room(NamedTuple):
    """What the buffers hold at once."""

    prompts: int
    rows: int


def room(prompts: int, samples: int, width: int, capacity: int, budget: int | None) -> Room:
    """Places for as many of prompts x samples responses as `budget` tokens hold.

    A prompt takes `width` tokens and a response `capacity`; None holds all of them.

    Raises:
        ValueError: the budget is less than one prompt and one response.
    """
    everything = Room(prompts, prompts * samples)
    if budget is None or everything.prompts * width + everything.rows * capacity <= budget:
        return everything
    if budget < width + capacity:
        raise ValueError(
            f"max_tokens_in_flight must be at least {width + capacity}, the longest prompt and its "
            f"response, got {budget}"
        )
    whole, left = divmod(budget, width + samples * capacity)
    # What is left may hold a prompt with some of its responses.
    part = min(samples - 1, (left - width) // capacity) if capacity and left > width else 0
    rows = whole * samples + part
    return Room(-(-rows // samples), rows)


def fixed_sizes(rows: int) -> list[int]:
    """Batch sizes from `rows` down: powers of two and halves between them, 48, 32, 24, 16, ..."""
    powers = [1 << bit for bit in range(rows.bit_length())]
    sizes = {rows, *powers, *(power + power // 2 for power in powers)}
    return sorted((size for size in sizes if size <= rows), reverse=True)


class Entry(NamedTuple):
    """Prompts and responses that enter."""

    prompts: list[tuple[int, int]]  # (place, prompt)
    rows: list[tuple[int, int]]  # (row, response)


class Moves(NamedTuple):
    """Copies (from, to) that bring what is left to the front."""

    prompts: list[tuple[int, int]]
    rows: list[tuple[int, int]]


class Rows:
    """Keeps track of which response each row decodes. Response r belongs to prompt r // samples."""

    def __init__(self, responses: int, samples: int, space: Room, sizes: list[int] | None) -> None:
        self.responses, self.samples, self.space = responses, samples, space
        self.sizes = sizes  # batch sizes that may be decoded; None is all
        self.entered = 0  # responses that have a row, or had one
        self.row: list[int | None] = [None] * space.rows  # the response that each decodes
        self.place: list[int | None] = [None] * space.prompts  # the prompt that each holds

    @property
    def waiting(self) -> int:
        return self.responses - self.entered

    @property
    def live(self) -> list[int]:
        """Rows whose response goes on."""
        return [row for row, response in enumerate(self.row) if response is not None]

    def should_enter(self) -> bool:
        """Whether enough of the responses that wait would find a row and their prompt a place."""
        begun = -self.entered % self.samples  # responses left of the prompt that entered last
        places = self.place.count(None)
        fit = min(self.row.count(None), self.waiting, begun + places * self.samples)
        return fit > 0 and fit >= min(_ENTER * len(self.row), self.waiting)

    def enter(self) -> Entry:
        """Give free rows to responses that wait; a place to each prompt that has none yet."""
        prompts: list[tuple[int, int]] = []
        rows: list[tuple[int, int]] = []
        free_rows = [row for row, response in enumerate(self.row) if response is None]
        free_places = [place for place, prompt in enumerate(self.place) if prompt is None]
        for row in free_rows[: self.waiting]:
            prompt = self.entered // self.samples
            if prompt not in self.place:
                if not free_places:
                    break
                place = free_places.pop(0)
                self.place[place] = prompt
                prompts.append((place, prompt))
            self.row[row] = self.entered
            rows.append((row, self.entered))
            self.entered += 1
        return Entry(prompts, rows)

    def retire(self, rows: list[int]) -> None:
        """The responses of `rows` have ended; a prompt leaves with the last of its responses."""
        for row in rows:
            self.row[row] = None
        decoded = {response // self.samples for response in self.row if response is not None}
        if self.waiting and self.entered % self.samples:
            decoded.add(self.entered // self.samples)
        self.place = [prompt if prompt in decoded else None for prompt in self.place]

    def fitting(self) -> int:
        """The smallest batch size that holds all live rows."""
        count = max(1, len(self.live))
        return count if self.sizes is None else min(size for size in self.sizes if size >= count)

    def shrink(self, size: int) -> Moves:
        """Keep `size` rows: move those at the back to free ones, and prompts likewise."""
        row_moves = _move_to_front(self.row, size)
        prompt_moves = _move_to_front(self.place, min(size, len(self.place)))
        return Moves(prompt_moves, row_moves)

    def place_of_row(self) -> list[int]:
        """For each row the index (prompt's place * samples + number among its samples), distinct.

        A row without a response takes an index that is free.
        """
        where = {prompt: place for place, prompt in enumerate(self.place) if prompt is not None}
        found: list[int | None] = [
            None
            if response is None
            else where[response // self.samples] * self.samples + response % self.samples
            for response in self.row
        ]
        taken = set(found)
        free = iter([i for i in range(len(self.place) * self.samples) if i not in taken])
        return [next(free) if index is None else index for index in found]


def _move_to_front(items: list[int | None], size: int) -> list[tuple[int, int]]:
    """Cut `items` to `size`, moving those behind it to places that are None."""
    free = [i for i, item in enumerate(items[:size]) if item is None]
    behind = [i for i in range(size, len(items)) if items[i] is not None]
    moves = list(zip(behind, free, strict=False))
    assert len(moves) == len(behind)
    for source, target in moves:
        items[target] = items[source]
    del items[size:]
    return moves
